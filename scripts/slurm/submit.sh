#!/usr/bin/env bash
# Submit a conversion that is retried if it fails, and verified at the end:
#
#   scripts/slurm/submit.sh SRC DST --tp 8 --pp 8
#   SBATCH_OPTIONS="--partition=cpu --nodes=4" RETRIES=3 scripts/slurm/submit.sh SRC DST --tp 8 --pp 8
#
# Each try starts when the one before has ended in any way, and is the same command: it continues where that one stopped, or
# finds the conversion complete and ends at once.
set -euo pipefail

RETRIES="${RETRIES:-2}"                                       # tries after the first
read -r -a SBATCH_WORDS <<<"${SBATCH_OPTIONS:-}"              # options for all jobs, such as --account and --partition

if [ $# -lt 2 ]; then
    echo "usage: $(basename "$0") SRC DST [options of convert]" >&2
    exit 2
fi
here="$(cd "$(dirname "$0")" && pwd)"

submit() {
    sbatch --parsable ${SBATCH_WORDS[@]+"${SBATCH_WORDS[@]}"} "$@"
}

job="$(submit "$here/convert.sbatch" "$@")"
echo "convert: job $job"
for ((try = 1; try <= RETRIES; try++)); do
    job="$(submit --dependency="afterany:${job%%;*}" "$here/convert.sbatch" "$@")"
    echo "continue if needed: job $job"
done
check="$(submit --nodes=1 --ntasks=1 --dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes "$here/verify.sbatch" "$1" "$2")"
echo "verify: job $check"
