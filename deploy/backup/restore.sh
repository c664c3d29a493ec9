#!/usr/bin/env bash
# Puts a backup back, as far as files go: the database's directory, and the model registry.
#
#   deploy/backup/restore.sh BACKUP PGDATA [REGISTRY]
#
# With the log that archive.sh kept, to a moment after the backup, not only to it:
#   ARCHIVE=/backups/log TARGET_TIME='2026-01-31 13:37:00+00' …     the state of that moment (its time zone must be said), read and write
#   ARCHIVE=/backups/log …                                          the last state that the archive holds, read and write
#   ARCHIVE=/backups/log READ_ONLY=1 …                              the last state, to look at and to export from: it archives nothing
#
# Both must be empty or absent. Run it as the database's own user, or give PGDATA to that user afterwards. Then start PostgreSQL on PGDATA, and before anything else is started:
#   DATABASE_URL=… deploy/backup/tombstones.sh replay < NEWEST_tombstones.csv
#   DATABASE_URL=… python -m services.feedback finish-erasures
# docs/runbooks/restore.md says where the newest list comes from.
set -euo pipefail
backup=${1:?say which backup}
data=${2:?say where the database goes}
registry=${3:-}

archive=${ARCHIVE:-}
moment=${TARGET_TIME:-}
if [ -n "$moment${READ_ONLY:-}" ] && [ -z "$archive" ]; then
  echo "TARGET_TIME and READ_ONLY need ARCHIVE: a backup alone has one state" >&2; exit 2
fi
if [ -n "$moment" ] && ! [[ $moment =~ (Z|[+-][0-9]{2}(:?[0-9]{2})?)$ ]]; then
  echo "TARGET_TIME must say its time zone, such as +00: $moment" >&2; exit 2
fi

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
if [ -n "$archive" ]; then
  quoted() { printf "'%s'" "${1//\'/\'\'}"; }
  {
    printf 'restore_command = %s\n' "$(quoted "cp \"$archive/%f\" \"%p\"")"
    # Left to itself PostgreSQL stops at the moment and waits to be asked.
    printf "recovery_target_action = 'promote'\n"
    [ -z "$moment" ] || printf 'recovery_target_time = %s\n' "$(quoted "$moment")"
  } >> "$data/postgresql.auto.conf"
  if [ -n "${READ_ONLY:-}" ]; then touch "$data/standby.signal"; else touch "$data/recovery.signal"; fi
fi
if [ -n "$registry" ]; then
  mkdir -p "$registry"
  tar -C "$registry" -xzf "$backup/registry.tar.gz"
fi
echo "Restored the state of $(cat "$backup/taken-at")${archive:+, to be taken on by PostgreSQL to ${moment:-the end of the log}}. Do not serve before the erased people are erased again."
