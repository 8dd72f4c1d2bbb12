"""One file per upstream family; none imports another, and none imports a vendor package when it is imported."""
