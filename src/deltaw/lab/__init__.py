"""The lab: thirteen live pictures of why adapters work, computed by the library on a real base."""
