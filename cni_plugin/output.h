/* SPDX-License-Identifier: Apache-2.0 */
/* Writes one JSON object to standard output. Nothing else in the plugin writes. */
#pragma once

#include "config.h"

/* Each prints and returns the exit code: 0; 1 for a failure and if the write fails. */
int print_result(const struct config *config);
int print_versions(const struct config *config);
int print_failure(const struct config *config, const struct failure *failure);
