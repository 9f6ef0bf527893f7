"""Pictures and label images: one reader, files, shards, remote folders."""
