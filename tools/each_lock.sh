#!/usr/bin/env bash
# Every lock file of requirements/, with the Python that its name says:
#   tools/each_lock.sh locks                      made anew (tools/lock.py), where that Python has packaging and torch
#   tools/each_lock.sh locks-check [NAME...]      a dry run of pip: every file is there, has its hash, and they fit together
# A Python is python3.N, or pyenv's. A lock file whose Python is not here is named as not checked.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?locks or locks-check}; shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(cpu-py311 cpu-py311-vllm cpu-py312 cpu-py313 gpu-cu13-py312)

python_of() { # cpu-py312 -> a python3.12
  local version=${1#*py3}
  version=3.${version%%-*}
  for python in .venv-$version/bin/python .venv/bin/python "$(command -v "python$version")" \
      "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
    if [ -x "$python" ] && "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      echo "$python"
      return
    fi
  done
}

failed=0
for name in "${names[@]}"; do
  python=$(python_of "$name")
  if [ -z "$python" ]; then
    echo "$name: not checked, there is no Python for it here"
  elif [ "$what" = locks ]; then
    "$python" tools/lock.py "requirements/$name.txt" || failed=1
  elif "$python" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --require-hashes \
      -r "requirements/$name.txt" >/dev/null; then
    echo "$name: pip would install it"
  else
    echo "$name: pip would not install it" >&2
    failed=1
  fi
done
exit $failed
