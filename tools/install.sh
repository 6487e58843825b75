#!/usr/bin/env bash
# Creates .venv with the project and its extras. A second call returns at once and needs no network.
# A part that cannot be installed is reported in one line with the lost function, and the installation continues.
set -euo pipefail
cd -P "$(dirname "$0")/.."

venv=.venv
stamp=$venv/installed
log=build/install.log
ffcv_packages=(libopencv-dev libturbojpeg0-dev pkg-config)
notes=()

say() { echo "dive_fast: $*"; }
die() {
    say "$*" >&2
    exit 1
}
note() {
    say "$*"
    notes+=("$*")
}

has_ffcv_libraries() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }

# The key contains the probe, so that the next call tries again after the libraries were installed by hand, and the
# folder, since an editable installation points to it.
key() {
    {
        cat pyproject.toml constraints.txt tools/install.sh
        echo "$PWD"
        if has_ffcv_libraries; then echo "FFCV's libraries"; fi
    } | sha256sum
}

if [ -x $venv/bin/python ] && [ -f $stamp ] && [ "$(head -n 1 $stamp)" = "$(key)" ]; then
    tail -n +2 $stamp | while read -r line; do say "$line"; done
    exit 0
fi

mkdir -p build
: >$log

apt_updated=
apt_install() {
    local sudo=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    say "installing with apt-get: $*"
    if [ -z "$apt_updated" ]; then
        apt_updated=1
        "${sudo[@]}" apt-get update >>$log 2>&1 || true
    fi
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" >>$log 2>&1
}

# Runs the interpreter, since a version manager puts names on PATH that do not run.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}
has_compiler() { command -v c++ >/dev/null; }
has_headers() { [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }
can_make_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
# The scripts of a venv contain its path, and do not work in a copied or moved checkout.
has_venv() { is_recent $venv/bin/python && grep -qsF "$PWD/$venv/" $venv/bin/pip; }

if has_venv; then
    python=$venv/bin/python
elif ! python=$(find_python); then
    for package in python3.12 python3.11 python3; do
        if apt_install $package; then break; fi
    done
    python=$(find_python) || die "Python 3.11 or newer is missing: install it, or set PYTHON=/path/to/python"
fi

debian_python=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
packages=()
has_compiler || packages+=(g++)
has_headers || packages+=("$debian_python-dev")
has_venv || can_make_venv || packages+=("$debian_python-venv")
if [ ${#packages[@]} -gt 0 ]; then apt_install "${packages[@]}" || true; fi
if ! has_compiler || ! has_headers; then
    note "torch.compile, Triton and DeepSpeed's CPU optimizer unavailable: install g++ $debian_python-dev"
fi
has_ffcv_libraries || apt_install "${ffcv_packages[@]}" || true

if ! has_venv; then
    can_make_venv || die "Python's venv module is missing: install $debian_python-venv"
    "$python" -m venv --clear $venv
fi

# Bytecode is compiled at the end on all cores; pip uses one.
pip_install() {
    $venv/bin/python -m pip install --no-compile --constraint constraints.txt "$@" >>$log 2>&1
}
project() { pip_install --build-constraint constraints.txt --editable ".[$1]"; }

say "installing into $venv (several GB, a few minutes; log in $log)"
say "1 of 5: torch, DeepSpeed, open_clip and what the tests need"
if ! { pip_install pip setuptools && project test; }; then
    tail -n 20 $log >&2
    die "installation failed; see $log"
fi
# An extra is installed if its module imports: an installed package can still lack a shared library.
extra() { project "$1" && $venv/bin/python -c "import $2" >>$log 2>&1; }

failed="cannot be installed (see $log); to try again, remove $stamp"
say "2 of 5: Triton"
extra triton triton || note "Triton kernels unavailable (losses run in plain PyTorch): triton $failed"
say "3 of 5: DALI"
extra dali nvidia.dali || note "DALI loader unavailable: nvidia-dali $failed"
say "4 of 5: class names and templates of known data sets"
extra evaluation clip_benchmark || note "class names and templates of known data sets unavailable: clip-benchmark $failed"
say "5 of 5: FFCV"
if ! extra ffcv ffcv; then
    if has_ffcv_libraries; then
        note "FFCV loader unavailable: ffcv $failed"
    else
        note "FFCV loader unavailable: install ${ffcv_packages[*]}"
    fi
fi

# Some packages contain tests in the syntax of other Python versions.
$venv/bin/python -m compileall -q -j 0 $venv/lib >>$log 2>&1 || true

{
    key
    if [ ${#notes[@]} -gt 0 ]; then printf '%s\n' "${notes[@]}"; fi
} >$stamp
