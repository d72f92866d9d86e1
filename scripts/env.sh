# Makes .venv with the locked dependencies; sourced by quickstart.sh and test.sh.
#   make_env <folder> <python> <extras>       extras: "" or "[dev]"
# uv when it is there or pip can fetch it, else pip. Both read requirements.lock as constraints, and
# both compile what they install: else every process would do so anew where folders are read only.

find_python() { # find_python <version or "">: prints an interpreter >= 3.11
  local candidate
  for candidate in ${1:+python$1} ${1:+$HOME/.pyenv/versions/$1*/bin/python} \
    ${1:-python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if [ -z "$1" ] || [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$1" ]; then
        command -v "$candidate"
        return 0
      fi
    fi
  done
  echo "no Python ${1:->= 3.11} found; install one and try again" >&2
  return 1
}

make_env() {
  local folder=$1 python=$2 extras=$3 stamp
  stamp="$(cat pyproject.toml requirements.lock | cksum) $extras"
  if [ -x "$folder/bin/loopfm" ] && [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi
  echo "installing into $folder ..." >&2
  "$python" -m venv "$folder"
  local uv=("$folder/bin/uv" pip install --python "$folder/bin/python" --compile-bytecode)
  if command -v uv >/dev/null; then
    uv[0]=uv
  elif ! "$folder/bin/python" -m pip install -q uv 2>/dev/null; then
    uv=("$folder/bin/python" -m pip install)
  fi
  "${uv[@]}" -q -c requirements.lock -e ".$extras"
  echo "$stamp" > "$folder/.stamp"
}
