"""Look at the limits of this process before a run starts and before each save; every rank calls it.

Memory is looked at when the staging memory is allocated: at `warm_up`, or at the first save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.preflight.process_limits import BASE_FILES, check_descriptors, check_semaphores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcp_hf_writer.manager.rank_messages import World


def check_start(world: World, *, in_process: bool) -> None:
    """Check what the run needs from the start.

    Args:
        world: The ranks: each one is a connection of the run's own process group.
        in_process: Whether torch's checkpointer process runs the saves.

    Raises:
        StagingError: If this process cannot have it.
    """
    ranks = 0 if world.is_alone else world.size
    what = f"saves of {world.size} ranks" if ranks else "saves"
    check_descriptors(BASE_FILES + ranks, what=what, rank=world.rank)
    if in_process:
        check_semaphores(rank=world.rank)


def check_save(
    world: World,
    count_files: Callable[..., int],
    state_dict: Mapping[str, Any],
    *,
    has_export: bool,
) -> None:
    """Check what one save needs.

    Args:
        world: The ranks.
        count_files: Returns the number of files of the export; takes the next two arguments.
        state_dict: What is saved.
        has_export: Whether the save writes an export.

    Raises:
        StagingError: If this process cannot have it.
    """
    export_files = count_files(state_dict, has_export=has_export)
    what = f"a save with {export_files} files of the export" if export_files else "a save"
    check_descriptors(BASE_FILES + export_files, what=what, rank=world.rank)
