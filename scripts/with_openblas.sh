#!/bin/sh
# Runs a command with OpenBLAS preloaded on Linux: MLX's CPU wheel bundles the reference BLAS,
# whose matrix products are some ten times slower.
set -eu

if [ "$(uname -s)" = Linux ]; then
    library=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | awk '/libopenblas\.so\.0 / {print $NF; exit}')
    if [ -n "$library" ]; then
        export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
    fi
fi
exec "$@"
