"""Make any training script a leaf of a BranchKey federation by adding one line."""
