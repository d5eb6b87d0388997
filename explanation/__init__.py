"""Why a model answers as it does: relevance in space and time, and checks of it."""
