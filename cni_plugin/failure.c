/* SPDX-License-Identifier: Apache-2.0 */
#include "failure.h"

#include <stdarg.h>

int fail(struct failure *failure, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    json_decref(failure->msg);
    failure->code = code;
    failure->msg = json_vsprintf(format, arguments); /* NULL if the text is not UTF-8 */
    va_end(arguments);
    return -1;
}
