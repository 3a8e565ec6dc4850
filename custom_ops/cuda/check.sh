#!/bin/sh
# Compiles every kernel and checks the output for spills, serialised products and warnings: for CI, which has no GPU.
set -e
cd "$(dirname "$0")/../.."
if ! command -v nvcc > /dev/null; then
  echo "check-cuda: nvcc is not there; the kernels were not compiled"
  exit 0
fi
custom_ops/cuda/build.sh
problems=$(grep -HE '[1-9][0-9]* bytes spill|wgmma.mma_async instructions are serialized|warning' build/cuda/*.log || true)
if [ -n "$problems" ]; then
  echo "check-cuda: registers are spilled, products serialised, or the compiler warns:"
  echo "$problems"
  exit 1
fi
for name in gemm_bfloat16 attention_prompts; do
  nvcc -arch=compute_90a -std=c++17 -ptx -Icustom_ops/cuda "custom_ops/cuda/$name.cu" -o "build/cuda/$name.ptx"
  grep -q wgmma.mma_async "build/cuda/$name.ptx" || { echo "check-cuda: $name has no wgmma"; exit 1; }
done
echo "check-cuda: $(ls build/cuda/*.o | wc -l) files compiled, no spills"
