#!/usr/bin/env bash
# Makes a release of the commit that is checked out: `deploy/release.sh VERSION [DIRECTORY]`.
#
#   dist/VERSION/shopkeeper_protos-*.whl   the stubs, which other teams install
#   dist/VERSION/sbom-<service>.cdx.json   what each image carries
#   dist/VERSION/licences.md               under which terms
#   dist/VERSION/CHANGELOG.md              what changed
#   dist/VERSION/SHA256SUMS
#   images shopkeeper/<service>:VERSION    where an engine runs
#
# The files are the same, byte for byte, whoever makes them from the same commit: times are the commit's.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?say which version}
target=${2:-dist/$version}
python=${PYTHON:-.venv/bin/python}

if [ -z "${ALLOW_DIRTY:-}" ] && [ -n "$(git status --porcelain)" ]; then
  echo "There are changes that no commit has; a release is of a commit." >&2
  exit 2
fi
revision=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0
mkdir -p "$target"

# From a copy: a build leaves directories behind, and what lies there goes into the next wheel. Modes, too, are the same everywhere.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git archive HEAD protos/python CHANGELOG.md | tar -x -C "$copy" --no-same-permissions
find "$copy" -type d -exec chmod 755 {} + -o -type f -exec chmod 644 {} +

# What builds is pinned too, as in the images.
tools=${TOOLS:-$copy/tools}
if ! [ -x "$tools/bin/cyclonedx-py" ] && ! { "$python" -m venv "$tools" \
  && "$tools/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r requirements/build.txt; }; then
  echo "The tools of requirements/build.txt cannot be installed here: there is no release." >&2
  exit 3
fi
"$tools/bin/pip" wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$target" "$copy/protos/python"
for service in feedback profile trainer recommend registry-mirror; do
  "$tools/bin/cyclonedx-py" requirements --output-reproducible --of JSON -o "$target/sbom-$service.cdx.json" \
    "requirements/$service.txt" 2> /dev/null
done
"$python" deploy/licences.py > "$target/licences.md"
{ echo "# Shopkeeper $version"; echo; sed -n '/^## \[Unreleased\]/,/^## \[[0-9]/p' "$copy/CHANGELOG.md" | sed '1d;/^## \[[0-9]/d'; } > "$target/CHANGELOG.md"
(cd "$target" && find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%P\n' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
cat "$target/SHA256SUMS"

if [ -z "${NO_IMAGES:-}" ] && command -v docker > /dev/null && docker info > /dev/null 2>&1; then
  for service in feedback profile trainer recommend; do
    docker build --quiet --build-arg VERSION="$version" --build-arg REVISION="$revision" \
      --build-arg SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" -f "services/$service/Dockerfile" -t "shopkeeper/$service:$version" .
  done
  docker build --quiet --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    -f deploy/registry-mirror/Dockerfile -t "shopkeeper/registry-mirror:$version" .
else
  echo "No container engine answers, or NO_IMAGES is set: no images were built." >&2
fi
