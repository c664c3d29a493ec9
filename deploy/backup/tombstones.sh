#!/usr/bin/env bash
# The list of erased people: pseudonyms and times, nothing else of them, under a message authentication code.
#
#   DATABASE_URL=… SHOPKEEPER_KEYS=… deploy/backup/tombstones.sh export > tombstones.csv
#   DATABASE_URL=… SHOPKEEPER_KEYS=… deploy/backup/tombstones.sh replay [--exported-after 2026-01-31T12:00:00Z] < tombstones.csv
#
# `replay` marks everybody on the list as to be erased, then `python -m services.feedback finish-erasures` erases them.
# It is run on a restored database before anything is served from it; running it twice does no harm. A list that was
# changed or cut off, or that is older than the database or than the time given, is refused before anything of it is
# replayed. Needs Python with the requirements of feedback, or
# its image, in which the same are `python -m services.feedback export-tombstones` and `replay-tombstones`.
set -euo pipefail
: "${DATABASE_URL:?is not set}"
case ${1:-} in
  export | replay)
    cd "$(dirname "$0")/../.."
    exec "${PYTHON:-python}" -m services.feedback "$1-tombstones" "${@:2}"
    ;;
  *) echo "say export or replay" >&2; exit 2 ;;
esac
