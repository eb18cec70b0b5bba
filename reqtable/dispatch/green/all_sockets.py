"""All that the option `suspend_all_sockets` replaces. Importing this module replaces nothing yet."""

from contextlib import suppress

import reqtable.dispatch.green.names
import reqtable.dispatch.green.select_calls
import reqtable.dispatch.green.socket_calls
from reqtable.dispatch.green.replacements import REPLACEMENTS

with suppress(ImportError):  # Python may have been built without ssl
    import reqtable.dispatch.green.tls_calls  # noqa: F401

__all__ = ["REPLACEMENTS"]
