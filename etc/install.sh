#!/bin/sh
# Install fd-dp as a systemd service (`make install`). Run it again to upgrade; /etc/fd/dp.toml is kept.
#   install.sh                    install everything; run as root
#   install.sh --no-environment   install all but the virtual environment, which exists (a package, an image)
#   install.sh --uninstall        remove fd-dp; /etc/fd, /var/lib/fd with its models, /var/log/fd and user fd stay
#   PREFIX_DIR  virtual environment (default /opt/fd-dp)
#   PYTHON      Python that creates it, executable by user fd (default /usr/bin/python3)
#   DESTDIR     directory in which packagers stage the files of /etc and /usr/local; without environment, user and
#               systemctl
# No file for logrotate is installed: each program rotates its own files below /var/log/fd by size.
set -eu
umask 022
PREFIX_DIR=${PREFIX_DIR:-/opt/fd-dp}
PYTHON=${PYTHON:-/usr/bin/python3}
DESTDIR=${DESTDIR:-}
SOURCE=$(cd "$(dirname "$0")/.." && pwd)
UNITS=/etc/systemd/system
MAN=/usr/local/share/man
COMPLETION=/usr/local/share/bash-completion/completions/fdctl

fail() {
    echo "install: ERROR ($1)" >&2
    exit 1
}

install_environment() {
    [ -x "$PREFIX_DIR/bin/python" ] || "$PYTHON" -m venv "$PREFIX_DIR"
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    pip() { "$PREFIX_DIR/bin/python" -m pip "$@"; }
    # The operations must be compiled against the Paddle that will load them.
    "$SOURCE/etc/build_requires.sh" | pip install -r /dev/stdin
    pip install --no-build-isolation --upgrade "$SOURCE"
}

install_files() {
    mkdir -p "$DESTDIR/etc/fd" "$DESTDIR$UNITS" "$DESTDIR$MAN/man1" "$DESTDIR$MAN/man8" "$DESTDIR/usr/local/bin"
    if [ -e "$DESTDIR/etc/fd/dp.toml" ]; then
        echo "install: kept $DESTDIR/etc/fd/dp.toml"
    else
        install -m 0640 "$SOURCE/etc/dp.toml" "$DESTDIR/etc/fd/dp.toml"
    fi
    for unit in fd-dp.service fd-dp-engines.service; do
        sed "s|/opt/fd-dp/|$PREFIX_DIR/|g" "$SOURCE/etc/$unit" >"$DESTDIR$UNITS/$unit"
        chmod 0644 "$DESTDIR$UNITS/$unit"
    done
    install -m 0644 "$SOURCE/etc/fd-dp.8" "$DESTDIR$MAN/man8/fd-dp.8"
    install -m 0644 "$SOURCE/etc/fdctl.1" "$DESTDIR$MAN/man1/fdctl.1"
    ln -sfn "$PREFIX_DIR/bin/fdctl" "$DESTDIR/usr/local/bin/fdctl"
    if "$PREFIX_DIR/bin/fdctl" completion bash >/dev/null 2>&1; then
        mkdir -p "$DESTDIR${COMPLETION%/*}"
        "$PREFIX_DIR/bin/fdctl" completion bash >"$DESTDIR$COMPLETION"
    fi
}

# dp.toml may contain keys: group fd may read it, only root may write it.
install_user() {
    # The group may exist already: an uninstall leaves it while it has other members.
    if getent group fd >/dev/null; then group=--gid=fd; else group=--user-group; fi
    id fd >/dev/null 2>&1 ||
        useradd --system "$group" --home-dir /var/lib/fd --no-create-home --shell /usr/sbin/nologin fd
    chown root:fd /etc/fd /etc/fd/dp.toml
    chmod 0750 /etc/fd
    chmod 0640 /etc/fd/dp.toml
}

# Download and pack as user fd, which reads the files later. Other models need no preparation.
install_demo_model() {
    grep -q '^path *= *"demo"' /etc/fd/dp.toml || return 0
    install -d -o fd -g fd -m 0750 /var/lib/fd /var/lib/fd/models
    for step in fastdeploy.demo_model "fastdeploy.weight_cache demo"; do
        # shellcheck disable=SC2086 -- a module and its arguments
        setpriv --reuid=fd --regid=fd --init-groups env HOME=/var/lib/fd FD_MODEL_CACHE=/var/lib/fd/models \
            "$PREFIX_DIR/bin/python" -m $step
    done
}

uninstall() {
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ] && [ -e "$UNITS/fd-dp.service" ]; then
        systemctl disable --now fd-dp fd-dp-engines
    fi
    rm -f "$DESTDIR$UNITS/fd-dp.service" "$DESTDIR$UNITS/fd-dp-engines.service" "$DESTDIR$COMPLETION" \
        "$DESTDIR$MAN/man8/fd-dp.8" "$DESTDIR$MAN/man1/fdctl.1" "$DESTDIR/usr/local/bin/fdctl"
    [ -n "$DESTDIR" ] && return
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
    # Remove the directory only if it is a virtual environment.
    if [ -e "$PREFIX_DIR/pyvenv.cfg" ]; then rm -rf "$PREFIX_DIR"; fi
    rm -rf /run/fd
    echo "install: removed fd-dp; /etc/fd, /var/lib/fd, /var/log/fd and user fd stay"
}

[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "no permission for $PREFIX_DIR and /etc; run it as root, or set DESTDIR"
case "$#${1:-}" in
0) [ -n "$DESTDIR" ] || install_environment ;;
1--no-environment)
    [ -x "$PREFIX_DIR/bin/fd-dp" ] || fail "$PREFIX_DIR/bin/fd-dp does not exist; set PREFIX_DIR to its environment"
    ;;
1--uninstall)
    uninstall
    exit
    ;;
*) fail "unknown option $*; options are --no-environment and --uninstall" ;;
esac

install_files
if [ -z "$DESTDIR" ]; then
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
    install_user
    install_demo_model
    if systemctl is-active --quiet fd-dp 2>/dev/null; then
        echo "install: done. To upgrade what runs: fdctl restart router; systemctl restart fd-dp; fdctl restart all"
    else
        echo "install: done. Edit /etc/fd/dp.toml, then: systemctl enable --now fd-dp; fdctl status"
    fi
fi
