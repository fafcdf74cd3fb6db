#!/bin/sh
# platform/ is a source root. An __init__.py in it would shadow the standard library's `platform`, and break even pytest.
if [ -e "$(dirname "$0")/../../platform/__init__.py" ]; then
    echo "platform/__init__.py exists: it shadows the standard library's module of that name. Delete it." >&2
    exit 1
fi
