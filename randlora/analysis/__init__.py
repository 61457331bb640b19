"""What the library costs, measured: layers beside their peers, training steps, and a step's memory."""
