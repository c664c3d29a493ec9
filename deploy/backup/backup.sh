#!/usr/bin/env bash
# Backs up the suite: the database as it is on disk, the list of erased people, the model registry.
#
#   DATABASE_URL=postgresql://… SHOPKEEPER_KEYS=… deploy/backup/backup.sh DIRECTORY [REGISTRY]
#
# The database goes as a physical copy. A dump by pg_dump would not do: readers follow the log by transaction ids,
# and a new cluster begins to count anew. Needs a login with REPLICATION, and PostgreSQL's client programs of the
# server's version. Keys are not backed up here: they belong to a vault, apart from the data that they open.
set -euo pipefail
: "${DATABASE_URL:?is not set}"
directory=${1:?say where the backup goes}
registry=${2:-}

[ ! -e "$directory" ] || { echo "$directory exists; a backup is never written over another" >&2; exit 2; }
umask 077
staging="$directory.partial"
rm -rf "$staging"
mkdir -p "$staging"

pg_basebackup --dbname="$DATABASE_URL" --pgdata="$staging/database" --format=plain --wal-method=stream --checkpoint=fast
pg_verifybackup --quiet "$staging/database"
"$(dirname "$0")/tombstones.sh" export > "$staging/tombstones.csv"
if [ -n "$registry" ]; then
  # Versions never change once they are there; an alias changes by a rename, so a copy is whole at any moment.
  tar -C "$registry" --exclude='./.*' -czf "$staging/registry.tar.gz" .
fi
date -u +%Y-%m-%dT%H:%M:%SZ > "$staging/taken-at"
sync "$staging"
mv "$staging" "$directory"
echo "$directory: $(du -sh "$directory" | cut -f1), $(($(wc -l < "$directory/tombstones.csv") - 1)) people erased so far"
