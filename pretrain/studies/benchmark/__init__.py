"""Speed and memory: measured side by side, on whatever machine this is."""
