/* The optional module reqtable._lean. It is empty as yet. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "reqtable._lean",
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__lean(void)
{
    return PyModuleDef_Init(&definition);
}
