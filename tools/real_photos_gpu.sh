#!/usr/bin/env bash
# Trains and evaluates real-photo models at 256 x 256 on one GPU: CamVid segmentation, CamVid panoptic, colorization.
# usage: tools/real_photos_gpu.sh OUT [key=value ...]
# The data are expected under $UVIM_FSQ_DATA: camvid, camvid_panoptic, imagenet_sample.
set -euo pipefail
out=$1
shift
common=(data.workers=4 eval.workers=4 eval.batch_size=64 train.precision=bf16 train.batch_size=64 train.save_every=1000
  train.eval_every=1000 train.resume=auto)
oracle=(data.image_size=256 model.patch_size=16 model.width=384 model.encoder_depth=4 model.decoder_depth=6
  model.num_heads=6 model.mlp_dim=1536 model.code_length=64 "model.quantizer.levels=[8,6,5]" train.steps=5000)
lm=(model.encoder.patch_size=16 model.encoder.width=384 model.encoder.depth=8 model.encoder.num_heads=6 model.width=384
  model.depth=6 model.num_heads=6 model.mlp_dim=1536 train.steps=8000)
run() { # name, oracle configuration, LM configuration
  uvim-fsq train-oracle "$2" "${common[@]}" "${oracle[@]}" "train.out=$out/$1_oracle" "${@:4}"
  uvim-fsq train-lm "$3" "${common[@]}" "${lm[@]}" "oracle=$out/$1_oracle" "train.out=$out/$1_lm" "${@:4}"
  uvim-fsq evaluate "$out/$1_lm" --baseline --report "$out/$1.html" --json "$out/$1.json"
}
cd "$(dirname "$0")/.."
run segmentation examples/camvid_segmentation/oracle.yaml examples/camvid_segmentation/lm.yaml "$@"
run panoptic configs/coco_panoptic/camvid_oracle.yaml configs/coco_panoptic/camvid_lm.yaml "$@"
run color configs/imagenet_color/sample_oracle.yaml configs/imagenet_color/sample_lm.yaml "$@"
