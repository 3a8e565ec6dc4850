#!/bin/sh
# Builds build/cuda/libfd_cuda.so, and with --bench also libfd_bench.so for the benchmarks. Registers and spills of each
# kernel are in build/cuda/*.log. JOBS=n compiles n files at a time.
set -e
cd "$(dirname "$0")/../.."
out=build/cuda
mkdir -p "$out"
arch="-gencode=arch=compute_90a,code=sm_90a"
# Sums must be the same in every instance of a kernel, so only explicit calls are fused multiply-adds.
flags="$arch -std=c++17 -O3 -fmad=false -Xptxas -v -lineinfo -Xcompiler -fPIC,-Wall -Icustom_ops/cuda"
for source in custom_ops/cuda/*.cu; do
  name=$(basename "$source" .cu)
  if [ -z "$(find custom_ops/cuda custom_ops/include/fd_device.h -newer "$out/$name.o" \
      \( -name '*.h' -o -name '*.cuh' -o -path "$source" \) 2>&1)" ]; then continue; fi
  echo "$name"
done | xargs -r -P "${JOBS:-2}" -I{} sh -c "nvcc $flags -c custom_ops/cuda/{}.cu -o $out/{}.o > $out/{}.log 2>&1 ||
  { cat $out/{}.log; rm -f $out/{}.o; exit 1; }"
nvcc $arch -shared -cudart static -o "$out/libfd_cuda.so" "$out"/*.o
if [ "$1" = --bench ]; then
  nvcc $arch -O3 -shared -cudart static -Xcompiler -fPIC benchmarks/cuda_read.cu -o "$out/libfd_bench.so"
fi
