#!/usr/bin/env bash
# Measure speed and memory on a GPU (`make gpu-benchmarks`); results go to output/benchmarks.
# Usage: tools/gpu_benchmarks.sh FOLDER_OF_JPEGS [REFERENCE_MODULE.py]; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

images=${1:-}
reference=()
[ -z "${2:-}" ] || reference=(--reference-module "$2")
variants="eager,packed,compiled,compiled+dropped computed,eager+compiled,cropped on device"
out=output/benchmarks

[ -d "$images" ] || { echo "error: IMAGES=$images is no folder; give one of JPEG files." >&2; exit 2; }
mkdir -p "$out"
measure() { "${PYTHON:-python3}" tools/benchmark.py "$@"; }

measure data --images "$images" "${reference[@]}" --json "$out/data.json"
for batch in 64 256; do
    measure pretrain-step --device cuda --batch-size "$batch" --variants "$variants" \
        "${reference[@]}" --json "$out/step_$batch.json"
done
for model in base_p16 small_p8; do
    measure pretrain-step --device cuda --batch-size 64 \
        --config-file "configs/pretrain/flsl_vit_${model}_in1k.py" \
        --variants "packed,packed+checkpointed" --json "$out/step_$model.json" \
        model.backbone.use_act_checkpoint=False
done
measure end-to-end --images "$images" --device cuda --batch-size 256 --workers 16 --repeats 50 \
    "${reference[@]}" --json "$out/end_to_end.json" \
    views.on_device=crops model.pack_views=True train.compile=True
for positions in "" --rel-pos; do
    measure detection --device cuda --model b --size 1024 --batch-size 2 ${positions:+"$positions"} \
        --json "$out/detection$positions.json"
done
measure scaling --device cuda --batch-size 64 --batches 16,32,64,128,256 \
    --plot "$out/scaling.png" --json "$out/scaling.json"
