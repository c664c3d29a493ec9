#!/usr/bin/env bash
# Judges what is deployed: Dockerfiles (hadolint), rendered manifests (kubernetes-validate, checkov), alerts (promtool).
# Usage: deploy/verify.sh DIRECTORY_OF_THE_TOOLS
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$1
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

"$tools/hadolint" services/*/Dockerfile deploy/registry-mirror/Dockerfile tests/compose/runner/Dockerfile
echo "hadolint: clean"

for target in base overlays/dev overlays/staging overlays/production; do
  kubectl kustomize "deploy/k8s/$target" > "$rendered/${target//\//-}.yaml"
done
# Components over the base, as the tests render them.
for component in deploy/k8s/components/*/; do
  name=$(basename "$component")
  work=$(mktemp -d deploy/k8s/.render-XXXXXX)
  needs=; [ "$name" = single-node ] && needs="  - ../components/registry-pvc"$'\n'
  printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: shopkeeper\nresources: [../base]\ncomponents:\n%s  - ../components/%s\n' \
    "$needs" "$name" > "$work/kustomization.yaml"
  kubectl kustomize "$work" > "$rendered/component-$name.yaml" || { rm -rf "$work"; exit 1; }
  rm -rf "$work"
done
# Kinds of operators have no schema here.
python - "$rendered" <<'PYTHON'
import pathlib, sys, yaml
foreign = ("cert-manager.io", "monitoring.coreos.com", "postgresql.cnpg.io", "external-secrets.io")
for path in pathlib.Path(sys.argv[1]).glob("*.yaml"):
    objects = [each for each in yaml.safe_load_all(path.read_text()) if each]
    path.write_text(yaml.safe_dump_all(each for each in objects if not each["apiVersion"].startswith(foreign)))
PYTHON
"$tools/kubernetes-validate" --strict --quiet "$rendered"/*.yaml
echo "kubernetes-validate --strict: clean"

"$tools/checkov" --quiet --compact --skip-download --framework kubernetes --directory "$rendered" --config-file deploy/checkov.yaml
"$tools/checkov" --quiet --compact --skip-download --framework dockerfile --directory services --directory deploy/registry-mirror --config-file deploy/checkov.yaml
echo "checkov: clean"

if command -v promtool > /dev/null; then
  (cd deploy/observability && promtool check config prometheus.yaml && promtool test rules rules_test.yaml)
else
  echo "promtool is not installed (Debian: apt-get install prometheus): alerts were not tested"
fi
