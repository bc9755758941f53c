-- Quarantines keys of a wrong type: moves them out of the way. Follows the generated names; all other parts follow, and call
-- Redis through the `redis` of this one.
-- Any hand may write under a key that jobs share, while the key does not exist. A command that meets such a key has written
-- nothing: the key is moved, and the command runs again, so a script is never cut in half by one. Looking only after an error
-- costs nothing while there is none.
-- A job's own keys are not moved by a command that meets them: what they held can't be made again. Who finds one odd ends
-- the job (`bury` in the prelude), or begins it anew (enqueue.lua).

local redis, quarantine, answer, raise = redis

do
  local server = redis
  local KEPT_SECONDS, NOTED = 604800, 64  -- how long, and how many are noted
  local moved = {}  -- key, type and new place of each in turn

  local function is_error(reply) return type(reply) == 'table' and reply.err ~= nil end

  local function rename(key, place)
    server.call('RENAME', key, place)
    server.call('EXPIRE', place, KEPT_SECONDS)
  end

  -- Notes a key that is about to be moved. Returns Redis's error, or nil.
  local function note(key, kind, place, now)
    local log = k_quarantine()
    local found = server.call('TYPE', log).ok
    if found ~= 'zset' and found ~= 'none' then rename(log, k_quarantined(log .. ':' .. now)) end
    local reply = server.pcall('ZADD', log, now, kind .. ' ' .. place)
    if is_error(reply) then return reply end
    server.call('ZREMRANGEBYRANK', log, 0, -NOTED - 1)
    server.call('EXPIRE', log, KEPT_SECONDS)
    moved[#moved + 1], moved[#moved + 2], moved[#moved + 3] = key, kind, place
  end

  -- Moves a key out of the way. Returns an error if that can't be, or nil.
  function quarantine(key)
    local time = server.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    local kind, place = server.call('TYPE', key).ok, k_quarantined(key .. ':' .. now)
    if not server.acl_check_cmd('RENAME', key, place) then
      return {err = 'NOPERM the key ' .. key .. ' is a ' .. kind .. ', and this user may not quarantine it'}
    end
    -- First what takes memory: a full Redis then refuses a script that has written nothing yet, as it should.
    local problem = note(key, kind, place, now)
    if not problem then rename(key, place) end
    return problem
  end

  local function is_of_job(key)
    for _, start in ipairs({k_job(''), k_events(''), k_rq_job('')}) do
      if string.sub(key, 1, #start) == start then return true end
    end
    return false
  end

  -- What a command that failed replies once the key that it met is out of its way.
  local function again(reply, command, key, ...)
    if string.sub(reply.err, 1, 9) ~= 'WRONGTYPE' or is_of_job(key) then return reply end
    return quarantine(key) or server.pcall(command, key, ...)
  end

  local function try(...)
    local reply = server.pcall(...)
    if is_error(reply) then return again(reply, ...) end
    return reply
  end

  local function call(...)
    local reply = server.pcall(...)
    if is_error(reply) then
      reply = again(reply, ...)
      if is_error(reply) then raise(reply) end
    end
    return reply
  end

  -- Fails with an error of Redis's own. Its `pcall` makes a text of one; as a table it keeps its code.
  function raise(problem) error(type(problem) == 'table' and problem or {err = problem}, 0) end

  -- Whether a reply says that its key is of another type. Fails if it is another error: that says nothing of the key.
  local function is_odd(reply)
    if not is_error(reply) then return false end
    if string.sub(reply.err, 1, 9) ~= 'WRONGTYPE' then raise(reply) end
    return true
  end

  -- A script's reply: with the keys that it moved, if there are any.
  function answer(reply)
    if #moved == 0 then return reply end
    return {QUARANTINED, reply, unpack(moved)}
  end

  redis = {call = call, pcall = try, error_reply = server.error_reply, is_odd = is_odd}
end
