/* The lean path in C: what reqtable does for a line that arrives whole.

       on_ready   Stream.on_ready               receives
       take_in    Steps.take_in                 finds the item, runs the step, sends the answer
       _resume    StateRequestHandler._resume   calls the state, follows its transition
       _send      ResumableHandler._send        queues the first output of a step

   Each function does the most frequent case of a Python method. In any other case it calls that method, or the method
   that the Python form calls then. So this file decides nothing, and knows no server and no policy.
   reqtable/handlers/lean.py installs the functions.

   SLOT reads a slot of an object whose type was checked; what it returns is borrowed, and lives at least until the next
   call of Python. The system calls do not wait, so the GIL is kept. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <structmember.h>
#include <sys/socket.h>

#ifdef Py_GIL_DISABLED
#error "the lean path relies on the GIL"
#endif

/* -- types, constants and the replaced methods (`install` is given them), slots, names ---------------------------- */

#define KNOWN(X) \
    X(Stream) X(Steps) X(Entry) X(RequestTable) X(Limits) X(Output) X(Input) X(Line) X(Declaration) \
    X(StateRequestHandler) X(ResumableHandler) X(Socket) X(MISSING) X(READING) X(AWAITS_INPUT) X(SMALL_BYTES) \
    X(on_ready) X(take_in) X(_resume) X(_send)
#define SLOTS(X) \
    X(Stream, entry) X(Stream, request) X(Stream, steps) X(Entry, active_at) X(Entry, bytes_in) X(Entry, bytes_out) \
    X(Entry, deadline) X(Entry, held) X(Entry, input) X(Entry, output) X(Entry, resumable) X(Entry, state) \
    X(Entry, steps) X(Entry, table) X(Entry, timeout) X(Entry, transport) X(Entry, want) X(Output, first) \
    X(Output, more) X(Output, size) X(Output, held) X(Input, data) X(Line, limit) X(Declaration, function) \
    X(Declaration, want) X(Declaration, timeout) X(RequestTable, idle_is_unbounded) X(RequestTable, limits) \
    X(RequestTable, now) X(RequestTable, running) X(RequestTable, thread) X(Limits, recv_bytes) \
    X(Limits, output_bytes_max)
#define NAMES(X) \
    X(fail) X(_keep) X(_queue) X(_raised) X(_resume) X(_state) X(_stay_failed) X(_take_end) X(_unreadable) \
    X(_unwritable) X(_went) X(arm) X(awaits) X(declaration) X(entry) X(first) X(fileno) X(flush) X(needs_bytes) X(timeout) X(timeouts)

#define A_KNOWN(name) static PyObject *k_##name;
#define A_SLOT(type, name) static Py_ssize_t type##_##name;
#define A_NAME(name) static PyObject *n_##name;
KNOWN(A_KNOWN)
SLOTS(A_SLOT)
NAMES(A_NAME)

enum { NONE = -1, ODD = -2 }; /* see `first` */
static char received[65536]; /* the GIL is held from recv to the copy */

/* -- attributes, slots, errors ------------------------------------------------------------------------------------ */

#define PLACE(object, slot) (*(PyObject **)((char *)(object) + (slot)))
/* An empty slot reads as None, so that no call gets a null pointer. */
#define SLOT(object, slot) (PLACE(object, slot) != NULL ? PLACE(object, slot) : Py_None)
#define SET(object, slot, value) Py_XSETREF(PLACE(object, slot), Py_NewRef(value))
#define IS(object, type) (Py_TYPE(object) == (PyTypeObject *)k_##type)
#define EXTENDS(object, type) PyObject_TypeCheck(object, (PyTypeObject *)k_##type)
#define TABLE(entry, slot) SLOT(SLOT(entry, Entry_table), RequestTable_##slot)
/* A limit may be larger than any size. */
#define LIMIT(entry, slot) PyNumber_AsSsize_t(SLOT(TABLE(entry, limits), Limits_##slot), NULL)

/* Return whether it is an Entry of a RequestTable; a subclass has the same slots. */
static int is_entry(PyObject *it)
{
    return EXTENDS(it, Entry) && EXTENDS(SLOT(it, Entry_table), RequestTable) && IS(TABLE(it, limits), Limits);
}

static int is_done(PyObject *result) { Py_XDECREF(result); return result != NULL; }

/* Return whether a result is true; -1 for an error. */
static int is_true(PyObject *result)
{
    int answer = result == NULL ? -1 : PyObject_IsTrue(result);
    return is_done(result) ? answer : -1;
}

/* Add to the number in a slot. Returns 0 for an error. */
static int add(PyObject *object, Py_ssize_t slot, Py_ssize_t more)
{
    long long before = PyLong_AsLongLong(SLOT(object, slot));
    PyObject *sum = before == -1 && PyErr_Occurred() ? NULL : PyLong_FromLongLong(before + more);
    if (sum != NULL)
        SET(object, slot, sum);
    return is_done(sum);
}

/* Have an output hold `piece` alone; None: nothing. Returns 0 for an error. */
static int fill(PyObject *output, PyObject *piece, Py_ssize_t size)
{
    PyObject *number = PyLong_FromSsize_t(size);
    if (number != NULL) {
        SET(output, Output_first, piece);
        SET(output, Output_size, number);
        SET(output, Output_held, number);
    }
    return is_done(number);
}

/* Call object.method([entry,] error) for the error that is set, as in an `except` block. */
static PyObject *call_with_error(PyObject *object, PyObject *method, PyObject *entry)
{
    PyObject *type, *error, *traceback, *outer = PyErr_GetHandledException();
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    PyException_SetTraceback(error, traceback ? traceback : Py_None);
    PyErr_SetHandledException(error);
    PyObject *result = PyObject_CallMethodObjArgs(object, method, entry ? entry : error, entry ? error : NULL, NULL);
    PyErr_SetHandledException(outer);
    Py_XDECREF(outer);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return result;
}

static int descriptor(PyObject *request)
{
    PyObject *number = PyObject_CallMethodNoArgs(request, n_fileno);
    int fd = number == NULL ? -1 : (int)PyLong_AsLong(number);
    return is_done(number) ? fd : -1;
}

/* After a system call that failed: return None if the socket is not ready, else what stream.method(error) returns. */
static PyObject *not_now(PyObject *stream, PyObject *method)
{
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        Py_RETURN_NONE;
    PyErr_SetFromErrno(PyExc_OSError);
    return call_with_error(stream, method, NULL);
}

/* -- sending ------------------------------------------------------------------------------------------------------ */

/* Return whether the kernel has taken all output of `entry`, as far as this was tried; -1 for an error. */
static int flush(PyObject *entry)
{
    PyObject *output = SLOT(entry, Entry_output), *transport = SLOT(entry, Entry_transport);
    PyObject *piece = IS(output, Output) ? SLOT(output, Output_first) : NULL;
    if (piece == NULL || piece == Py_None)
        return piece == Py_None;
    if (IS(transport, Stream) && IS(SLOT(transport, Stream_request), Socket) && PyBytes_CheckExact(piece) &&
        SLOT(output, Output_more) == Py_None && PyBytes_GET_SIZE(piece) < PyLong_AsSsize_t(k_SMALL_BYTES)) {
        Py_ssize_t sent = send(descriptor(SLOT(transport, Stream_request)), PyBytes_AS_STRING(piece),
                               (size_t)PyBytes_GET_SIZE(piece), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            return is_done(not_now(transport, n__unwritable)) ? 0 : -1;
        if (!add(entry, Entry_bytes_out, sent))
            return -1;
        if (PyLong_AsSsize_t(SLOT(output, Output_size)) == sent) /* it may have grown meanwhile */
            return fill(output, Py_None, 0) ? 1 : -1;
        if (!is_done(PyObject_CallMethod(output, "consume", "n", sent)))
            return -1;
    }
    return is_true(PyObject_CallMethodNoArgs(transport, n_flush));
}

/* -- Steps.take_in ------------------------------------------------------------------------------------------------ */

/* Return the item with which `data` begins, and its end. If want.first(data) finds none, return its answer, and NONE as
   the end; ODD if that is no answer at all. A Line is not asked. */
static PyObject *first(PyObject *want, PyObject *data, Py_ssize_t *end)
{
    Py_ssize_t size = PyBytes_GET_SIZE(data);
    if (IS(want, Line)) {
        Py_ssize_t limit = PyNumber_AsSsize_t(SLOT(want, Line_limit), NULL);
        const char *begin = PyBytes_AS_STRING(data), *newline = memchr(begin, '\n', (size_t)size);
        *end = newline == NULL || newline - begin >= limit ? NONE : newline - begin + 1;
        if (*end == NONE)
            return PyErr_Occurred() ? NULL : Py_NewRef(newline == NULL && size < limit ? k_MISSING : Py_None);
        return *end == size ? Py_NewRef(data) : PyBytes_FromStringAndSize(begin, *end);
    }
    PyObject *found = PyObject_CallMethodOneArg(want, n_first, data);
    *end = found != NULL && PyTuple_CheckExact(found) ? ODD : NONE;
    if (*end == ODD && PyTuple_GET_SIZE(found) == 2 && PyLong_CheckExact(PyTuple_GET_ITEM(found, 1))) {
        Py_ssize_t length = PyNumber_AsSsize_t(PyTuple_GET_ITEM(found, 1), NULL);
        *end = length >= 0 && length <= size ? length : ODD;
    }
    if (*end >= 0)
        Py_SETREF(found, Py_NewRef(PyTuple_GET_ITEM(found, 0)));
    return found;
}

/* Return whether the request, whose step has returned `want`, waits for input; -1 for an error. */
static int waits_for_input(PyObject *want, PyObject *before)
{
    if (want == before || want == Py_None)
        return want == before;
    PyObject *awaits = is_true(PyObject_GetAttr(want, n_needs_bytes)) == 1 ? PyObject_GetAttr(want, n_awaits) : NULL;
    Py_XDECREF(awaits);
    return PyErr_Occurred() ? -1 : awaits == k_AWAITS_INPUT;
}

/* Send the answer, and have `entry` wait as before. Returns 0 if output is left, and -1 for an error. */
static int stay(PyObject *steps, PyObject *entry, PyObject *table, PyObject *want)
{
    SET(entry, Entry_want, want); /* before the flush, which may record the entry */
    int stays = flush(entry);
    if (stays != 1)
        return stays;
    if (SLOT(table, RequestTable_idle_is_unbounded) == Py_True && SLOT(entry, Entry_timeout) == Py_None)
        SET(entry, Entry_deadline, Py_None);
    else {
        PyObject *timeouts = PyObject_GetAttr(steps, n_timeouts);
        stays = timeouts && is_done(PyObject_CallMethodOneArg(timeouts, n_arm, entry)) ? 1 : -1;
        Py_XDECREF(timeouts);
    }
    return stays;
}

/* Give `item`, which ends at the index `end` of `data`, to the handler, and go on. */
static PyObject *run(PyObject *steps, PyObject *entry, PyObject *table, PyObject *item, PyObject *data, Py_ssize_t end)
{
    PyObject *resumable = Py_NewRef(SLOT(entry, Entry_resumable)), *ends_loop = NULL, *result = NULL;
    int waits = -1, stays = 0;
    Py_INCREF(table);
    SET(table, RequestTable_running, entry);
    PyObject *want = PyObject_CallMethodOneArg(resumable, n__resume, item);
    SET(table, RequestTable_running, Py_None);
    if (want == NULL && (ends_loop = call_with_error(steps, n_fail, entry)) != NULL)
        want = Py_NewRef(Py_None);
    if (want != NULL && add(entry, Entry_steps, 1))
        waits = ends_loop == NULL ? waits_for_input(want, SLOT(entry, Entry_want)) : 0;
    if (waits == 1 && end == PyBytes_GET_SIZE(data) && SLOT(entry, Entry_state) == k_READING &&
        PyObject_Not(SLOT(entry, Entry_held)) == 1)
        stays = stay(steps, entry, table, want);
    if (stays < 0)
        result = call_with_error(steps, n__stay_failed, entry);
    else if (stays == 1)
        result = Py_NewRef(Py_None);
    else if (waits >= 0)
        result = PyObject_CallMethod(steps, "_go_on", "OOy#OO", entry, want, PyBytes_AS_STRING(data) + end,
                                     PyBytes_GET_SIZE(data) - end, waits ? Py_True : Py_False,
                                     ends_loop ? ends_loop : Py_False);
    Py_DECREF(table);
    Py_DECREF(resumable);
    Py_XDECREF(want);
    Py_XDECREF(ends_loop);
    return result;
}

static PyObject *take_in(PyObject *steps, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "take_in() takes an entry and its data");
    PyObject *entry = arguments[0], *data = arguments[1];
    if (!is_entry(entry) || !PyBytes_CheckExact(data) || !EXTENDS(SLOT(entry, Entry_input), Input))
        return PyObject_Vectorcall(k_take_in, (PyObject *[]){steps, entry, data}, 3, NULL);
    PyObject *table = SLOT(entry, Entry_table), *result = NULL;
    int has_unread = PyObject_IsTrue(SLOT(SLOT(entry, Entry_input), Input_data));
    Py_ssize_t end = NONE;
    PyObject *found = has_unread ? Py_NewRef(Py_None) : first(SLOT(entry, Entry_want), data, &end);
    if (end == ODD)
        result = PyObject_Vectorcall(k_take_in, (PyObject *[]){steps, entry, data}, 3, NULL);
    else if (has_unread >= 0 && add(entry, Entry_bytes_in, PyBytes_GET_SIZE(data))) {
        SET(entry, Entry_active_at, SLOT(table, RequestTable_now));
        if (found != NULL && end != NONE)
            result = run(steps, entry, table, found, data, end);
        else if (found != NULL)
            result = PyObject_CallMethodObjArgs(steps, n__keep, entry, data, found, NULL);
    }
    Py_XDECREF(found);
    return result;
}

/* -- Stream.on_ready ---------------------------------------------------------------------------------------------- */

static PyObject *on_ready(PyObject *stream, PyObject *mask)
{
    PyObject *entry = SLOT(stream, Stream_entry), *steps = SLOT(stream, Stream_steps);
    PyObject *request = SLOT(stream, Stream_request);
    int is_lean = IS(stream, Stream) && IS(steps, Steps) && IS(request, Socket) && is_entry(entry) &&
                  SLOT(entry, Entry_state) == k_READING;
    Py_ssize_t size = is_lean ? LIMIT(entry, recv_bytes) : 0;
    if (size <= 0 || size > (Py_ssize_t)sizeof received)
        return PyObject_Vectorcall(k_on_ready, (PyObject *[]){stream, mask}, 2, NULL);
    ssize_t count = recv(descriptor(request), received, (size_t)size, MSG_DONTWAIT);
    if (count < 0)
        return not_now(stream, n__unreadable);
    if (count == 0)
        return PyObject_CallMethodNoArgs(stream, n__take_end);
    Py_INCREF(entry);
    Py_INCREF(steps);
    PyObject *data = PyBytes_FromStringAndSize(received, count);
    PyObject *result = data == NULL ? NULL : take_in(steps, (PyObject *[]){entry, data}, 2);
    Py_DECREF(steps);
    Py_DECREF(entry);
    Py_XDECREF(data);
    return result;
}

/* -- StateRequestHandler._resume and ResumableHandler._send ------------------------------------------------------- */

static PyObject *_resume(PyObject *handler, PyObject *item)
{
    PyObject *current = PyObject_GetAttr(handler, n__state), *result = NULL;
    if (current == NULL || !IS(current, Declaration)) {
        Py_XDECREF(current);
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(k__resume, (PyObject *[]){handler, item}, 2, NULL);
    }
    PyObject *state = SLOT(current, Declaration_function), *next = NULL;
    PyObject *transition = PyObject_Vectorcall(state, (PyObject *[]){handler, item}, 2, NULL);
    int is_own = transition && PyMethod_Check(transition) && PyMethod_GET_SELF(transition) == handler;
    PyObject *function = is_own ? PyMethod_GET_FUNCTION(transition) : NULL;
    if (is_own && function != state && (next = PyObject_GetAttr(function, n_declaration)) == NULL)
        PyErr_Clear();
    if (transition == NULL)
        result = PyErr_ExceptionMatches(PyExc_Exception) ? call_with_error(handler, n__raised, NULL) : NULL;
    else if (is_own && function == state)
        result = Py_NewRef(SLOT(current, Declaration_want));
    else if (next == NULL || !IS(next, Declaration) || SLOT(next, Declaration_function) != function)
        result = PyObject_CallMethodObjArgs(handler, n__went, transition, current, NULL);
    else if (PyObject_SetAttr(handler, n__state, next) == 0) {
        PyObject *entry = PyObject_GetAttr(handler, n_entry);
        if (entry != NULL && PyObject_SetAttr(entry, n_timeout, SLOT(next, Declaration_timeout)) == 0)
            result = Py_NewRef(SLOT(next, Declaration_want));
        Py_XDECREF(entry);
    }
    Py_XDECREF(next);
    Py_XDECREF(transition);
    Py_DECREF(current);
    return result;
}

static PyObject *_send(PyObject *handler, PyObject *const *arguments, Py_ssize_t count, PyObject *names)
{
    if (count + (names == NULL ? 0 : PyTuple_GET_SIZE(names)) != 1)
        return PyErr_Format(PyExc_TypeError, "send() takes one argument, data");
    PyObject *data = arguments[0], *entry = PyObject_GetAttr(handler, n_entry), *result = NULL;
    int is_first = entry != NULL && names == NULL && is_entry(entry) && TABLE(entry, running) == entry &&
                   PyBytes_CheckExact(data) && PyBytes_GET_SIZE(data) > 0 &&
                   PyBytes_GET_SIZE(data) <= LIMIT(entry, output_bytes_max) && IS(SLOT(entry, Entry_output), Output) &&
                   SLOT(SLOT(entry, Entry_output), Output_first) == Py_None &&
                   (TABLE(entry, thread) == Py_None ||
                    PyLong_AsUnsignedLong(TABLE(entry, thread)) == PyThread_get_thread_ident());
    if (is_first && fill(SLOT(entry, Entry_output), data, PyBytes_GET_SIZE(data)))
        result = Py_NewRef(Py_None);
    else if (!PyErr_Occurred())
        result = names == NULL ? PyObject_CallMethodOneArg(handler, n__queue, data)
                               : PyObject_Vectorcall(k__send, (PyObject *[]){handler, data}, 1, names);
    Py_XDECREF(entry);
    return result;
}

/* -- the module --------------------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"on_ready", on_ready, METH_O, "on_ready($self, mask, /)\n--\n\n"},
    {"take_in", (PyCFunction)(void (*)(void))take_in, METH_FASTCALL, "take_in($self, entry, data, /)\n--\n\n"},
    {"_resume", _resume, METH_O, "_resume($self, item, /)\n--\n\n"},
    {"_send", (PyCFunction)(void (*)(void))_send, METH_FASTCALL | METH_KEYWORDS, "_send($self, data)\n--\n\n"},
};

/* Return the offset of a slot; -1 if there is none. */
static Py_ssize_t offset(PyObject *type, const char *name)
{
    PyObject *slot = PyObject_GetAttrString(type, name);
    int is_slot = slot != NULL && Py_IS_TYPE(slot, &PyMemberDescr_Type);
    Py_ssize_t found = is_slot ? ((PyMemberDescrObject *)slot)->d_member->offset : -1;
    Py_XDECREF(slot);
    return found;
}

/* Take the types and constants that `given`, a dict, names. Return the methods for their classes. */
static PyObject *install(PyObject *Py_UNUSED(module), PyObject *given)
{
#define TAKE(name) \
    if ((k_##name = Py_XNewRef(PyDict_GetItemString(given, #name))) == NULL) \
        return PyErr_Format(PyExc_KeyError, "%s", #name);
#define FIND(type, name) \
    if ((type##_##name = offset(k_##type, #name)) < 0) \
        return PyErr_Format(PyExc_TypeError, "%s.%s is no slot", #type, #name);
#define INTERN(name) \
    if ((n_##name = PyUnicode_InternFromString(#name)) == NULL) \
        return NULL;
    KNOWN(TAKE)
    SLOTS(FIND)
    NAMES(INTERN)
    PyObject *types[] = {k_Stream, k_Steps, k_StateRequestHandler, k_ResumableHandler}, *made = PyDict_New();
    for (size_t index = 0; made != NULL && index < sizeof types / sizeof *types; index++) {
        PyObject *method = PyDescr_NewMethod((PyTypeObject *)types[index], &methods[index]);
        if (method == NULL || PyDict_SetItemString(made, methods[index].ml_name, method) < 0)
            Py_CLEAR(made);
        Py_XDECREF(method);
    }
    return made;
}

static PyMethodDef functions[] = {{"install", install, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot slots[] = {
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_lean", .m_methods = functions, .m_slots = slots};

PyMODINIT_FUNC PyInit__lean(void) { return PyModuleDef_Init(&module); }
