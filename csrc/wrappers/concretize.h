// Tensor wrapper of concretize, for any backend.
#pragma once

#include "../common/checks.h"
#include "../ops/concretize.h"

namespace torch_prepared {

template <class Backend>
Tensor concretize(Tensor rows, Tensor center, Tensor radius) {
  const char* op = "concretize";
  check_floating(op, "rows", rows);
  check_like(op, "rows", rows, rows, {-1, -1, -1});
  const int64_t b = rows.size(0), s = rows.size(1), n = rows.size(2);
  check_like(op, "center", center, rows, {-1, n});
  check_broadcast(op, "center", center, 0, b);
  check_like(op, "radius", radius, rows, {center.size(0), n});
  const Backend backend(rows);
  rows = dense(rows);
  center = dense(center);
  radius = dense(radius);
  if (b == 0 || s == 0 || n == 0) return allocate_zeros(rows, {b, s});
  Tensor out = allocate(rows, {b, s});
  with_scalar(rows, [&](auto zero) {
    using T = decltype(zero);
    const ConcretizeArgs<T> args = {
        group_rows(b, s, n, center.size(0), 1), rows.template const_data_ptr<T>(),
        center.template const_data_ptr<T>(), radius.template const_data_ptr<T>(),
        out.template mutable_data_ptr<T>()};
    launch_concretize(args, backend.context());
  });
  return out;
}

}  // namespace torch_prepared
