#!/usr/bin/env bash
# From a raw project to training data: the chain to copy into cron.
#
#   bash examples/pipeline.sh [RAW_PROJECT [OUT_DIR]]
#
# Without arguments it makes a demo project of phantoms first. Set options here or by environment:
# CREATE, PREPROCESS and PROJECT are added to the commands below. Finished studies are kept, so a
# nightly run computes what is new. From a zip of STORE_FROM_GB on (default: 100) it writes no more
# than that, either: 3D and 2D files then are indices of files of studies, see docs/scale.md.
# Exit status: 0 all done, 3 some studies failed, else fatal.
set -uo pipefail
start=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$start/$1" ;; esac; }

cd "$here" || exit 1
. examples/venv.sh
venv_with requirements.txt || exit 1
python=$here/.venv/bin/python

if [ $# -eq 0 ]; then
    raw=$here/demo/raw out=$here/demo/out
    if [ ! -d "$raw" ]; then
        # Made under another name first: an interrupted demo is no project.
        rm -rf demo/raw.new && mkdir -p demo
        "$python" examples/phantom.py demo/raw.new && mv demo/raw.new "$raw" || exit 1
    fi
else
    raw=$(absolute "$1") out=$(absolute "${2:-$1_out}")
fi
mkdir -p "$out" || exit 1
name=$(basename "$raw")

status=0
step() { # Runs one script: goes on after status 0 and 3 (some studies failed), stops at others.
    echo "$(date '+%F %T') $(basename "$1")" >&2
    "$python" "$@"
    local code=$?
    case $code in
        0) ;;
        3) status=3 ;;
        *) echo "pipeline: $(basename "$1") ended with status $code" >&2; exit $code ;;
    esac
}

# Quotes in CREATE, PREPROCESS and PROJECT are the shell's: CREATE="--pet '*SUV*' --pet-units suv".
# Globs in them stay patterns.
create=() preprocess=() project=()
set -f
eval "create=(${CREATE:-}) preprocess=(${PREPROCESS:-}) project=(${PROJECT:-})"
set +f
step "$here/createproject.py" "$raw" -o "$out/$name.zip" ${create[@]+"${create[@]}"}
of_volumes=() of_merged=() of_mips=()
size_gb=$(($(wc -c <"$out/$name.zip") / 1000000000))
if [ -d "$out/${name}_3d.studies" ] || [ "$size_gb" -ge "${STORE_FROM_GB:-100}" ]; then
    of_volumes=(--store "$out/${name}_3d.studies") of_merged=(--link)
    # A stack is one dataset: it has no files of studies.
    [[ " ${PROJECT:-} " == *" --stack "* ]] || of_mips=(--store "$out/all_2d.studies")
fi
step "$here/preprocessing.py" "$out/$name.zip" -o "$out/${name}_3d.h5" \
    --measures "$out/${name}_lesions.csv" --report "$out/${name}.html" \
    ${of_volumes[@]+"${of_volumes[@]}"} ${preprocess[@]+"${preprocess[@]}"}
# More projects are merged by naming their files, too.
step "$here/mergeh5.py" "$out/${name}_3d.h5" -o "$out/all_3d.h5" ${of_merged[@]+"${of_merged[@]}"}
step "$here/project_2d.py" "$out/all_3d.h5" -o "$out/all_2d.h5" --gif "$out/gif" \
    ${of_mips[@]+"${of_mips[@]}"} ${project[@]+"${project[@]}"}

cat <<END
3D volumes:      $out/all_3d.h5
2D projections:  $out/all_2d.h5, listed in all_2d.csv
films:           $out/gif
lesions:         $out/${name}_lesions.csv
page to look at: $out/${name}.html
private mapping: $out/${name}_mapping.csv (keep it apart)
END
exit $status
