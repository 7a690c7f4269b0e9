// Hooks of ggml-rpc: what a worker does not compute, which build each side is, and how long a client waits.

#pragma once

#include <cstddef>
#include <cstdint>

// whether an operation of ggml has pointers of this process as parameters
bool qaflora_rpc_is_custom(int op);

// write this build into what both sides say first, of so many bytes
void qaflora_rpc_say_build(uint8_t * caps, size_t size);

// let a connection end whose other machine is gone without a word
void qaflora_rpc_keep_alive(uintptr_t fd);

// the same of a connection to a worker: from now on this process ends where a worker is lost
void qaflora_rpc_connected(uintptr_t fd);

// send() and recv(); of a client they end the process where the worker ends the connection, or is silent for
// QAFLORA_RPC_TIMEOUT seconds (60; 0: any time)
int64_t qaflora_rpc_send(uintptr_t fd, const char * data, size_t size);
int64_t qaflora_rpc_recv(uintptr_t fd, char * data, size_t size);
