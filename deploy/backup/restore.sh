#!/usr/bin/env bash
# Puts a backup back, as far as files go: the database's directory, and the model registry.
#
#   deploy/backup/restore.sh BACKUP PGDATA [REGISTRY]
#
# Both must be empty or absent. Run it as the database's own user, or give PGDATA to that user afterwards. Then start PostgreSQL on PGDATA, and before anything else is started:
#   DATABASE_URL=… deploy/backup/tombstones.sh replay < NEWEST_tombstones.csv
#   DATABASE_URL=… python -m services.feedback finish-erasures
# docs/runbooks/restore.md says where the newest list comes from.
set -euo pipefail
backup=${1:?say which backup}
data=${2:?say where the database goes}
registry=${3:-}

[ -f "$backup/taken-at" ] || { echo "$backup is no finished backup" >&2; exit 2; }
for target in "$data" ${registry:+"$registry"}; do
  [ -z "$(ls -A "$target" 2> /dev/null)" ] || { echo "$target is not empty" >&2; exit 2; }
done
pg_verifybackup --quiet "$backup/database"
umask 077
mkdir -p "$data"
cp -a "$backup/database/." "$data/"
chmod 700 "$data"
# A server that keeps its socket in its own directory leaves the lock in the backup: the process that it names is another machine's,
# or another process by now, and PostgreSQL would refuse to start.
rm -f "$data"/.s.PGSQL.*
if [ -n "$registry" ]; then
  mkdir -p "$registry"
  tar -C "$registry" -xzf "$backup/registry.tar.gz"
fi
echo "Restored the state of $(cat "$backup/taken-at"). Do not serve before the erased people are erased again."
