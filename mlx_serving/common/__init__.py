"""What producers and workers share: schemas, keys, protocol, connections, settings, errors."""
