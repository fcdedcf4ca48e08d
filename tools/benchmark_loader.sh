#!/usr/bin/env bash
# Measures the loader at 512 x 512 on synthetic files of realistic size: one core step by step, then all workers.
# usage: tools/benchmark_loader.sh OUT [key=value ...]     (takes minutes; OUT gets the results and 450 MB of data, once)
# Set OMP_NUM_THREADS=1 and run nothing else meanwhile.
set -euo pipefail
out=$1
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
synth() { # folder, format, height x width, other options
  [ -d "$out/$1" ] || python -m uvim_fsq synth --format "$2" --size "$3" --num 64 --num-val 2 --out "$out/$1" "${@:4}"
}
synth nyu_h5 nyu 480x640
synth nyu_mat nyu 480x640 --layout mat
synth nyu_png nyu 480x640 --layout png
synth nyu_png_prepared nyu 480x640 --layout png
synth coco coco_panoptic 480x640
synth coco_prepared coco_panoptic 480x640
synth imagenet imagenet 375x500
python -m uvim_fsq data prepare "$out/coco_prepared" --task coco_panoptic
python -m uvim_fsq data prepare "$out/nyu_png_prepared" --task nyu_depth
measure() { # folder, task, key=value ...
  python -m uvim_fsq benchmark loader "configs/$2/oracle.yaml" "data.root=$out/$1" data.train_split=train "${@:3}" \
    --json "$out/$1.json" | tee "$out/$1.md"
}
for folder in nyu_h5 nyu_mat nyu_png nyu_png_prepared; do measure $folder nyu_depth "$@"; done
for folder in coco coco_prepared; do measure $folder coco_panoptic "$@"; done
measure imagenet imagenet_color "$@"
