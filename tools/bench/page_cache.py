"""Makes reads cold: empties the caches of the kernel."""

import os
from dataclasses import dataclass
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class PageCache:
    """The kernel's caches of pages, directory entries and inodes. `droppable`: they may be emptied."""

    droppable: bool

    def drop(self) -> None:
        """Empties them for the whole machine, where that is allowed (admin-guide/sysctl/vm)."""
        os.sync()
        if self.droppable:
            DROP_CACHES.write_text("3")
