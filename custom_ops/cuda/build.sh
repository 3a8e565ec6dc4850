#!/bin/sh
# Builds libfd_cuda.so; prints registers and spills of each kernel to build/cuda/*.log.
set -e
cd "$(dirname "$0")/../.."
out=build/cuda
mkdir -p "$out"
flags="-gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -fmad=false -Xptxas -v -lineinfo -Xcompiler -fPIC,-Wall -Icustom_ops/cuda"
for source in custom_ops/cuda/*.cu; do
  object="$out/$(basename "$source" .cu).o"
  newest=$(ls -t "$object" "$source" custom_ops/cuda/*.h custom_ops/cuda/*.cuh custom_ops/include/fd_device.h 2>/dev/null | head -1)
  if [ "$newest" != "$object" ]; then echo "$source"; fi
done | xargs -r -P "${JOBS:-1}" -I{} sh -c '
  name=$(basename {} .cu)
  nvcc '"$flags"' -c {} -o '"$out"'/$name.o > '"$out"'/$name.log 2>&1 || { cat '"$out"'/$name.log; exit 1; }'
nvcc -gencode=arch=compute_90a,code=sm_90a -shared -cudart static -o "$out/libfd_cuda.so" "$out"/*.o
