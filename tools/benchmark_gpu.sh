#!/usr/bin/env bash
# Measures everything in docs/performance.md that needs a GPU, at full model sizes, without data sets or weights.
# usage: tools/benchmark_gpu.sh OUT [STEP ...]
# steps (default: all): tests train fed decode predict compare embeddings optimizer
# A step that fails is reported and the others go on. TASKS="nyu_depth" limits training to one task.
set -euo pipefail
out=$1
steps=${*:2}
cd "$(dirname "$0")/.."
mkdir -p "$out"
measure() { # name, arguments of uvim-fsq benchmark
  python -m uvim_fsq benchmark "${@:2}" --json "$out/$1.json" 2>&1 | tee "$out/$1.md" || echo "failed: $1"
}
for step in ${steps:-tests train fed decode predict compare embeddings optimizer}; do
  case $step in
  tests) python -m pytest -q -m gpu 2>&1 | tee "$out/tests.txt" || true ;;
  train)
    for task in ${TASKS:-coco_panoptic nyu_depth imagenet_color}; do
      for compile in true false; do
        measure "oracle_${task}_compile_$compile" train-oracle configs/$task/oracle.yaml train.compile=$compile --batch 64
        measure "lm_${task}_compile_$compile" train-lm configs/$task/lm.yaml train.compile=$compile --batch 32
      done
    done
    measure lm_batch_64 train-lm configs/nyu_depth/lm.yaml train.compile=true --batch 64
    measure operators train-oracle configs/coco_panoptic/oracle.yaml train.compile=true --batch 64 --operators 25
    ;;
  fed)
    [ -d "$out/data" ] || python -m uvim_fsq synth --format nyu --size 480x640 --num 512 --num-val 2 --out "$out/data"
    measure fed train-oracle configs/nyu_depth/oracle.yaml data.root="$out/data" data.workers=8 train.compile=true --batch 64
    ;;
  decode)
    measure decode decode configs/nyu_depth/lm.yaml --batch 1 16 64 256 --operators 25
    measure decode_compiled decode configs/nyu_depth/lm.yaml eval.compile=true --batch 1 64
    measure decode_masked decode configs/nyu_depth/lm.yaml model.kind=masked --batch 1 16 64
    ;;
  predict)
    run="$out/quickstart/lm"
    [ -d "$run" ] || python -m uvim_fsq quickstart --scenes 500 train.steps=200 --out "$out/quickstart" || echo "failed: quickstart"
    measure predict predict "$run" --batch 1 32
    measure start_up start-up "$run"
    python -m uvim_fsq compile "$run" --batch 1,32 || echo "failed: compile"
    measure predict_compiled predict "$run" --batch 1 32
    measure start_up_compiled start-up "$run"
    ;;
  compare) measure compare side-by-side configs/nyu_depth/lm.yaml --batch 1 16 64 ;;
  embeddings) python tools/label_embeddings.py 2>&1 | tee "$out/label_embeddings.txt" || echo "failed: embeddings" ;;
  optimizer) python tools/optimizer_step.py 2>&1 | tee "$out/optimizer.txt" || echo "failed: optimizer" ;;
  *) echo "unknown step $step" >&2 && exit 2 ;;
  esac
done
