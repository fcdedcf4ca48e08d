#!/usr/bin/env bash
# Packs finished runs as the files of a release: OUT/NAME.tar, each complete by itself, and OUT/SHA256SUMS.
#
#   tools/make_zoo.sh OUT LICENSE NAME=RUN ...
#   tools/make_zoo.sh build/zoo apache-2.0 depth_rooms=runs/quickstart/lm camvid=runs/camvid_lm
#
# The same runs give the same bytes. docs/sharing.md says how such files are used. Needs GNU tar.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1 license=$2
shift 2
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for pair in "$@"; do
    name=${pair%%=*} run=${pair#*=}
    if [[ ! $name =~ ^[a-z0-9_]+$ || $pair != *=* ]]; then
        echo "$pair: give NAME=RUN; a name has small letters, digits and _" >&2
        exit 2
    fi
    uvim-fsq push "$run" "zoo/$name" --license "$license" --folder "$work/$name"
    tar --create --file "$work/$name.tar" --directory "$work" --sort=name --mtime=@0 --owner=0 --group=0 \
        --numeric-owner --mode=u=rwX,go=rX "$name"
    mv "$work/$name.tar" "$out/$name.tar"
done
cd "$out"
sha256sum -- *.tar > SHA256SUMS
echo "written: $out/SHA256SUMS"
