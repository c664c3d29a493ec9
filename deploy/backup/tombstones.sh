#!/usr/bin/env bash
# The list of erased people: pseudonyms and times, nothing else of them.
#
#   DATABASE_URL=… deploy/backup/tombstones.sh export > tombstones.csv
#   DATABASE_URL=… deploy/backup/tombstones.sh replay < tombstones.csv
#
# `replay` marks everybody on the list as to be erased, then `python -m services.feedback finish-erasures` erases them.
# It is run on a restored database before anything is served from it; running it twice does no harm.
set -euo pipefail
: "${DATABASE_URL:?is not set}"
case ${1:-} in
  export)
    psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 "$DATABASE_URL" --command "\copy (SELECT encode(tombstone_key, 'hex'), ARRAY(SELECT encode(key, 'hex') FROM unnest(user_keys) AS key), erased_at FROM feedback.tombstones ORDER BY erased_at) TO STDOUT WITH (FORMAT csv)"
    ;;
  replay)
    psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --single-transaction "$DATABASE_URL" \
      --command "CREATE TEMPORARY TABLE erased (tombstone_key text, user_keys text[], erased_at timestamptz) ON COMMIT DROP" \
      --command "\copy erased FROM STDIN WITH (FORMAT csv)" \
      --command "INSERT INTO feedback.tombstones AS t (tombstone_key, user_keys, erased_at)
                 SELECT decode(tombstone_key, 'hex'), ARRAY(SELECT decode(key, 'hex') FROM unnest(user_keys) AS key), erased_at
                 FROM erased
                 ON CONFLICT (tombstone_key) DO UPDATE SET completed_at = NULL,
                   user_keys = ARRAY(SELECT DISTINCT unnest(t.user_keys || excluded.user_keys))"
    ;;
  *) echo "say export or replay" >&2; exit 2 ;;
esac
