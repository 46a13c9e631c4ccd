/* The only place that writes: one JSON object on standard output. */
#pragma once

#include "config.h"

/* Print and return the exit code: 0, or 1 for a failure and when standard output does not take it. */
int print_result(const struct config *config);
int print_versions(const struct config *config);
int print_failure(const struct config *config, const struct failure *failure);
