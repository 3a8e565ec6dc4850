#!/bin/sh
# make install: fd-dp as a service of this machine. Run again, it upgrades and keeps /etc/fd/dp.toml.
#   PREFIX_DIR  the virtual environment (default /opt/fd-dp)
#   PYTHON      makes it; user fd must be able to execute it (default /usr/bin/python3)
#   DESTDIR     stages the files of /etc there, for packagers; no environment, no user, no systemctl
set -eu
PREFIX_DIR=${PREFIX_DIR:-/opt/fd-dp}
PYTHON=${PYTHON:-/usr/bin/python3}
DESTDIR=${DESTDIR:-}
SOURCE=$(cd "$(dirname "$0")/.." && pwd)

if [ -z "$DESTDIR" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "install: ERROR (it writes to $PREFIX_DIR and /etc; run it as root, or set DESTDIR)" >&2
        exit 1
    fi
    [ -x "$PREFIX_DIR/bin/python" ] || "$PYTHON" -m venv "$PREFIX_DIR"
    pip() { "$PREFIX_DIR/bin/python" -m pip --disable-pip-version-check "$@"; }
    # The operations are compiled against the very Paddle that will load them.
    "$SOURCE/etc/build_requires.sh" | pip install -r /dev/stdin
    pip install --no-build-isolation --upgrade "$SOURCE"
    id fd >/dev/null 2>&1 ||
        useradd --system --user-group --home-dir /var/lib/fd --no-create-home --shell /usr/sbin/nologin fd
fi

mkdir -p "$DESTDIR/etc/fd" "$DESTDIR/etc/systemd/system"
if [ -e "$DESTDIR/etc/fd/dp.toml" ]; then
    echo "install: kept $DESTDIR/etc/fd/dp.toml"
else
    install -m 0644 "$SOURCE/etc/dp.toml" "$DESTDIR/etc/fd/dp.toml"
fi
for unit in fd-dp.service fd-dp-engines.service; do
    sed "s|/opt/fd-dp/|$PREFIX_DIR/|g" "$SOURCE/etc/$unit" >"$DESTDIR/etc/systemd/system/$unit"
    chmod 0644 "$DESTDIR/etc/systemd/system/$unit"
done

if [ -z "$DESTDIR" ]; then
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
    # As user fd, which will read it; a checkpoint of your own needs nothing.
    if grep -q '^path *= *"demo"' /etc/fd/dp.toml; then
        install -d -o fd -g fd -m 0750 /var/lib/fd /var/lib/fd/models
        for step in fastdeploy.demo_model "fastdeploy.weight_cache demo"; do
            # shellcheck disable=SC2086 -- a module and its words
            setpriv --reuid=fd --regid=fd --init-groups env HOME=/var/lib/fd FD_MODEL_CACHE=/var/lib/fd/models \
                "$PREFIX_DIR/bin/python" -m $step
        done
    fi
    echo "install: done. Edit /etc/fd/dp.toml, then: systemctl enable --now fd-dp; $PREFIX_DIR/bin/fdctl status"
fi
