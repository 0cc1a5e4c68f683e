#!/bin/sh
# Everything that needs a GPU, in about two minutes: build, check every case file, run the memory and race checkers on
# some of them, time at the size of 26B-A4B. Run from the repository's root; leaves its files in the folder given.
#   sh plugins/moe/measure.sh FOLDER
set -eu
folder=$1
architecture=${ARCHITECTURE:-90}
mkdir -p "$folder"
PYTHONPATH=src python3 -m gemma4_export.plugins.moe.kernel_cases "$folder/cases" &
nvcc -O3 -std=c++17 -gencode "arch=compute_$architecture,code=sm_$architecture" \
    plugins/moe/kernel_driver.cu plugins/moe/kernel_cuda.cu -o "$folder/moe_driver"
wait $!
"$folder/moe_driver" limits
"$folder/moe_driver" check "$folder"/cases/*.case
nvcc -O3 -std=c++17 -shared -Xcompiler -fPIC,-fvisibility=hidden \
    -gencode "arch=compute_$architecture,code=sm_$architecture" \
    plugins/moe/trt_plugin.cpp plugins/moe/ort_op.cpp plugins/moe/kernel_cpu.cpp plugins/moe/kernel_cuda.cu \
    -o "$folder/libgemma4_plugins.so"
"$folder/moe_driver" plugin "$folder/libgemma4_plugins.so" "$folder"/cases/*.case
if python3 -c 'import sys, onnxruntime as o; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())'; then
    python3 tests/moe_ort.py "$folder/libgemma4_plugins.so" CUDAExecutionProvider "$folder/cases"
else
    echo "onnxruntime has no CUDA provider here (extra gpu): its shell was not run on the GPU"
fi
"$folder/moe_driver" time
for tool in memcheck initcheck racecheck; do
    echo "compute-sanitizer $tool"
    compute-sanitizer --tool $tool --error-exitcode 1 "$folder/moe_driver" check \
        "$folder"/cases/*-k8-seven-tokens.case "$folder"/cases/*-k4-nan-logit.case
    compute-sanitizer --tool $tool --error-exitcode 1 "$folder/moe_driver" plugin "$folder/libgemma4_plugins.so" \
        "$folder"/cases/*-k8-seven-tokens.case "$folder"/cases/*-k4-nan-logit.case
done
