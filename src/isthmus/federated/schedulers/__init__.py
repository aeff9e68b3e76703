"""Who works when: a schedule names the clients of a mix and never touches tensors."""
