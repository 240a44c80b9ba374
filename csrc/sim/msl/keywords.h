// The address-space and function qualifiers of the Metal Shading Language. An engine has one address space, so they
// vanish, except that `constant` memory cannot be written. Included last, and undone by entry.h: the words are ordinary
// names in other headers.
#pragma once

#define device
#define threadgroup
#define thread
#define constant const
#define kernel static
