"""What tests share: ranks, faults, models, readers that do not use the package."""
