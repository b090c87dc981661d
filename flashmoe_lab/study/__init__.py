"""What turns runs into findings. It imports the engine; nothing of the engine imports it."""
