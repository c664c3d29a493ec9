#!/usr/bin/env bash
# Keeps a finished segment of PostgreSQL's write-ahead log, so that `restore.sh` can go to any moment since a backup:
#
#   archive_mode = on
#   archive_command = '/…/deploy/backup/archive.sh /backups/log %p %f'
#   archive_timeout = 60        # what a lost disk may cost, in seconds
#
# Answers 0 when the segment is on disk under its name, whole. Twice the same one does no harm; another one under the same name is
# refused: two clusters share the directory, and PostgreSQL says so in its log until that is mended.
set -euo pipefail
archive=${1:?say where the log is kept}
segment=${2:?say which file}
name=${3:?say its name}

if [ -e "$archive/$name" ]; then
  cmp --quiet "$segment" "$archive/$name" && exit 0
  echo "$archive/$name is there and differs: another cluster archives into this directory" >&2
  exit 1
fi
umask 077
cp -- "$segment" "$archive/.$name.partial"
sync "$archive/.$name.partial"
mv -- "$archive/.$name.partial" "$archive/$name"
sync "$archive"
