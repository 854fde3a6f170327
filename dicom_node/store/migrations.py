"""The catalog's schema, as sqlite-utils migrations, applied in order under the catalog lock.

`index_schema` and `queue_schema` each register their own; a migration that has landed is never changed, only followed.
"""

from __future__ import annotations
