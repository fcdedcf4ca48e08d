#!/usr/bin/env bash
# Submits a grid of `uvim-fsq ablate` as job arrays: every training is one array task, trainings that several cells share
# are done once, and a last job evaluates what is left and writes the tables.
#   tools/slurm/grid.sh configs/ablations/levels.yaml --out runs/levels [key=value ...]
# Takes the arguments of `uvim-fsq ablate`. Run it on a login node, where uvim-fsq is on the PATH, from a folder that all
# nodes see. A training uses one GPU; give train.accumulate= if its batch does not fit (`uvim-fsq plan` computes it).
# Options of sbatch, for all jobs: SBATCH_OPTIONS="--partition=gpu --time=48:00:00" tools/slurm/grid.sh ...
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out="" previous=""
for argument in "$@"; do
  [ "$previous" = --out ] && out=$argument
  case $argument in --out=*) out=${argument#--out=} ;; esac
  previous=$argument
done
[ -n "$out" ] || { echo "usage: grid.sh GRID --out FOLDER [arguments of uvim-fsq ablate]" >&2 && exit 2; }
read -r -a options <<<"${SBATCH_OPTIONS:-}"

cells=$(uvim-fsq ablate "$@" --dry-run)
mkdir -p "$out/slurm"
data=() all=""
sed -n "s/^  \(uvim-fsq synth .*\)/\1/p" <<<"$cells" >"$out/slurm/scenes.txt"
if [ -s "$out/slurm/scenes.txt" ]; then
  job=$(sbatch --parsable "${options[@]}" --array=1 "$here/array.sbatch" "$out/slurm/scenes.txt")
  data=(--dependency="afterany:${job%%;*}")
  echo "job ${job%%;*}: the synthetic scenes, in $out/data"
fi
first=("${data[@]}")
for stage in oracle lm direct; do
  after=("${data[@]}")
  # An LM needs its oracle. If one oracle fails, the other LMs are trained all the same.
  [ "$stage" = lm ] && after=("${first[@]}")
  file=$out/slurm/train_$stage.txt
  : >"$file"
  while IFS= read -r line; do
    run=${line##*train.out=}
    [ -f "${run%% *}/evaluation.json" ] || printf '%s\n' "$line" >>"$file"
  done < <(sed -n "s/^  \(uvim-fsq train-$stage .*\)/\1/p" <<<"$cells" | sort -u)
  count=$(wc -l <"$file")
  [ "$count" -gt 0 ] || continue
  job=$(sbatch --parsable "${options[@]}" "${after[@]}" --array="1-$count" "$here/array.sbatch" "$file")
  job=${job%%;*} all=$all:${job%%;*}
  [ "$stage" = oracle ] && first=(--dependency="afterany:$job")
  echo "job $job: $count trainings of stage $stage, in $file"
done
printf '%q ' uvim-fsq ablate "$@" --jobs 1 >"$out/slurm/tables.txt"
echo >>"$out/slurm/tables.txt"
after=()
[ -n "$all" ] && after=(--dependency="afterany$all")
job=$(sbatch --parsable "${options[@]}" "${after[@]}" --array=1 "$here/array.sbatch" "$out/slurm/tables.txt")
echo "job ${job%%;*}: evaluations and tables, in $out/report.html"
