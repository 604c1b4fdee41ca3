"""What a pageblock's pages are good for, and whom an allocation takes from when its own sort has run out."""

from enum import IntEnum
from typing import Final


class MigrateType(IntEnum):
    """What a pageblock's pages are good for (mm/page_alloc.c)."""

    UNMOVABLE = 0
    MOVABLE = 1
    RECLAIMABLE = 2


TYPES: Final = len(MigrateType)

# Whom to take from when a type has nothing left, as Linux does.
FALLBACKS: Final = {
    MigrateType.UNMOVABLE: (MigrateType.UNMOVABLE, MigrateType.RECLAIMABLE, MigrateType.MOVABLE),
    MigrateType.MOVABLE: (MigrateType.MOVABLE, MigrateType.RECLAIMABLE, MigrateType.UNMOVABLE),
    MigrateType.RECLAIMABLE: (MigrateType.RECLAIMABLE, MigrateType.UNMOVABLE, MigrateType.MOVABLE),
}
