-- Shared by every script; follows the generated k_<name>() functions and tenants.lua.
-- The control hash is the authority and is written first; RQ's hash and registries are a view
-- of it, written in the same script, so they can never disagree through a crash.

local unpack = unpack or table.unpack
-- Scripts look these up with each use: as locals that costs less.
local redis, string, table, ipairs, pairs, pcall, type, tonumber = redis, string, table, ipairs, pairs, pcall, type, tonumber

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function int(x) return string.format('%.0f', x) end

-- A stock tool may have left anything under a key; one odd key must stop nobody.
local function is_hash(key) return redis.call('TYPE', key).ok == 'hash' end

local RQ_STATUS = {queued = 'queued', running = 'started', finished = 'finished', failed = 'failed',
                   dead = 'failed', expired = 'failed', cancelled = 'canceled'}
local TERMINAL = {finished = true, failed = true, dead = true, expired = true, cancelled = true}
local OPEN = {queued = true, running = true}

local NUMBERS = {'ep', 'seq', 'at', 'ma', 'mp', 'dl', 'to', 'ab', 'ttl', 'sm', 'en', 'nd', 'sa', 'ft', 'co', 'su', 'nr', 'po'}
local LATER = {sa = true, ft = true, co = true, su = true, nr = true, po = true}  -- not there from the start

-- RQ's own rule for ids. Anybody may have pushed anything: bytes that are no text, a ':' (which
-- would read as another attempt's name), a line break for a log.
local function is_job_id(id) return #id > 0 and #id <= 256 and not string.find(id, '[^%w_-]') end

-- A control hash by its fields' names, or nil where it does not read as one of ours: the scripts do arithmetic with it.
local function sound_fields(id)
  if not is_job_id(id) then return nil end
  local raw = redis.pcall('HMGET', k_job(id), 'st', 'q', 'tn', 'af', unpack(NUMBERS))
  if raw.err then return nil end
  local c = {st = raw[1], q = raw[2], tn = raw[3] or nil, af = raw[4] or nil}
  if not (OPEN[c.st] or TERMINAL[c.st]) or not c.q then return nil end
  for i, name in ipairs(NUMBERS) do
    local value = raw[i + 4]
    -- up to 15 digits are exact as a Lua number
    if value and #value <= 15 and string.find(value, '^%d+$') then c[name] = value
    elseif value or not LATER[name] then return nil end
  end
  return c
end

local function is_sound(id) return sound_fields(id) ~= nil end

-- RQ's view decides nothing, so an odd key of it stops nothing.
local function show(view, ...) pcall(view, ...) end

-- Writes to keys that many jobs share, ours and RQ's. A script that handles many jobs at once gathers them
-- (`shared, shown = gather, gather_view`) and writes each key once, at its end (`write_gathered`): a call from a script
-- costs Redis more than what most of them do.
local shared, shown = redis.call, redis.call
local gathered, groups = {}, {}

local function gather(command, key, first, second)
  local of_command = groups[command]
  if not of_command then
    of_command = {}
    groups[command] = of_command
  end
  local deletes = command == 'DEL'
  local group = of_command[deletes or key]
  if not group then
    group = deletes and {command} or {command, key}
    of_command[deletes or key], gathered[#gathered + 1] = group, group
  end
  local last = #group
  if deletes then last, group[last + 1] = last + 1, key end
  group[last + 1], group[last + 2] = first, second
  return group
end

local function gather_view(...) gather(...).view = true end

local function write_gathered()
  for _, group in ipairs(gathered) do
    if group.view then show(redis.call, unpack(group)) else redis.call(unpack(group)) end
  end
end

-- Whether a job's attempt is the one that a worker speaks of. Redis may forget a claim (a failover, a power loss) and give
-- the same epoch again, to the same worker too. `c`: at least 'st', 'ep', 'ow', 'no', 'q' of a control hash, by these names.
local function is_attempt(c, epoch, nonce) return c.ep == epoch and c.no == nonce end

local function runs(c, worker, epoch, nonce)
  return c.st == 'running' and c.ow == worker and c.q and is_attempt(c, epoch, nonce)
end

-- Fields of a job's control hash by their names; a field that is not there is false, and nothing is where there is no hash.
local function read_fields(id, ...)
  local c = {}
  if not is_hash(k_job(id)) then return c end
  local values = redis.call('HMGET', k_job(id), ...)
  for i, name in ipairs({...}) do c[name] = values[i] end
  return c
end

-- Which terminal state a cancel reason leads to.
local function state_for(reason)
  if reason == 'deadline_exceeded' or reason == 'timeout' or reason == 'abandoned' then return 'expired' end
  return 'cancelled'
end

-- RQ's execution of one attempt is named by the job and its epoch.
local function view_drop_execution(id, queue, epoch, owner)
  local composite = id .. ':' .. epoch
  shown('DEL', k_rq_execution(composite), k_rq_executions(id))
  shown('ZREM', k_rq_started(queue), composite)
  if owner and owner ~= '' then shown('SREM', k_rq_worker_executions(owner), composite) end
end

local function view_start(id, queue, epoch, worker, iso, now)
  local composite = id .. ':' .. epoch
  redis.call('HSET', k_rq_job(id), 'status', 'started', 'worker_name', worker,
             'started_at', iso, 'last_heartbeat', iso)
  redis.call('PERSIST', k_rq_job(id))
  redis.call('HSET', k_rq_execution(composite), 'id', epoch, 'job_id', id,
             'created_at', now / 1000, 'last_heartbeat', now / 1000, 'worker_name', worker)
  -- Scored +inf: stock maintenance, by whatever wall clock, never ends a lease.
  redis.call('ZADD', k_rq_executions(id), '+inf', epoch)
  shown('ZADD', k_rq_started(queue), '+inf', composite)
  shown('SADD', k_rq_worker_executions(worker), composite)
end

local REGISTRIES = {{'finished', k_rq_finished}, {'failed', k_rq_failed}, {'canceled', k_rq_canceled}}

-- rq_result: nil, or {type, return_value (base64) or '', exc_string (base64 of zlib) or ''}
local function view_end(id, queue, state, iso, ttl, now, worker, epoch, rq_result)
  local key = k_rq_job(id)
  if redis.call('EXPIRE', key, ttl) == 0 then return end  -- there is none
  local status = RQ_STATUS[state]
  redis.call('HSET', key, 'status', status, 'ended_at', iso)
  for _, each in ipairs(REGISTRIES) do
    if each[1] == status then shown('ZADD', each[2](queue), int(math.floor(now / 1000) + ttl), id)
    else shown('ZREM', each[2](queue), id) end
  end
  if rq_result then
    local fields = {'type', rq_result[1], 'worker_name', worker, 'execution_id', epoch}
    if rq_result[2] ~= '' then fields[#fields + 1] = 'return_value'; fields[#fields + 1] = rq_result[2] end
    if rq_result[3] ~= '' then fields[#fields + 1] = 'exc_string'; fields[#fields + 1] = rq_result[3] end
    redis.call('XADD', k_rq_results(id), 'MAXLEN', 10, '*', unpack(fields))
    redis.call('EXPIRE', k_rq_results(id), ttl)
  end
end

-- What every event begins with is not stored with each: the entry's id is the seq. Readers put it
-- back (`calls.payloads`), so that a replay is byte for byte what was published.
local HEADER = '^{"v":1,"attempt":(%d+),"seq":%d+,'
local TOKENS_HEADER = HEADER .. '"type":"tokens","choices":%[{"index":0,(.*)$'

local function entry_fields(payload)
  local attempt, tokens = string.match(payload, TOKENS_HEADER)
  if attempt then return {'a', attempt, 't', tokens} end
  local _, last, other = string.find(payload, HEADER)
  if last then return {'a', other, 'e', string.sub(payload, last + 1)} end
  return {'e', payload}
end

local function append_event(id, seq, payload)
  redis.call('XADD', k_events(id), int(seq) .. '-0', unpack(entry_fields(payload)))
end

-- Fields of a control hash and their values, all in one call.
local function set_fields(id, fields)
  local flat = {}
  for name, value in pairs(fields) do flat[#flat + 1] = name; flat[#flat + 1] = value end
  if #flat > 0 then redis.call('HSET', k_job(id), unpack(flat)) end
end

-- Ends a job. The end event itself was appended by the caller; `fields`: what else its control hash is to say; `known`:
-- its 'ttl' and 'tn', where the caller has read them.
local function finalize(id, queue, state, code, message, result, iso, now, owner, epoch, rq_result, fields, known)
  local key = k_job(id)
  local c = known or redis.call('HMGET', key, 'ttl', 'tn')
  local ttl = tonumber(c[1] or '') or 3600
  fields = fields or {}
  fields.st, fields.fi, fields.err, fields.msg = state, int(now), code, message
  if result ~= '' then fields.res = result end
  set_fields(id, fields)
  shared('ZREM', k_leases(queue), id)
  shared('ZREM', k_open(queue), id)
  shared('ZREM', k_deadlines(), id)
  redis.call('EXPIRE', key, ttl)
  redis.call('EXPIRE', k_events(id), ttl)
  if c[2] then tolerantly(tenant_ends, id, queue, c[2]) end
  show(view_drop_execution, id, queue, epoch, owner)
  show(view_end, id, queue, state, iso, ttl, now, owner, epoch, rq_result)
end

-- Ends a job that no live worker holds: the script itself writes the end event.
local function finalize_unowned(id, queue, state, code, message, iso, now)
  local c = redis.call('HMGET', k_job(id), 'seq', 'ep', 'sm', 'ow')
  local seq = (tonumber(c[1]) or 0) + 1
  local payload = '{"v":1,"attempt":' .. int(tonumber(c[2]) or 0) .. ',"seq":' .. int(seq) ..
    ',"type":"end","state":"' .. state .. '","error":{"code":"' .. code .. '","message":' ..
    cjson.encode(message) .. ',"retryable":false}}'
  local kind = redis.call('TYPE', k_events(id)).ok
  if kind ~= 'stream' and kind ~= 'none' then redis.call('DEL', k_events(id)) end
  if pcall(append_event, id, seq, payload) then  -- fails where the stream is ahead of the hash
    redis.call('HSET', k_job(id), 'seq', int(seq))
    if c[3] ~= '0' then redis.pcall('PUBLISH', k_channel(id), payload) end
  end
  finalize(id, queue, state, code, message, '', iso, now, c[4] or '', c[2] or '0', nil)
end

-- Ends a job whose control hash is not sound, so that it stops nobody else.
local function bury(id, queue, iso, now)
  local key = k_job(id)
  if is_hash(key) then
    local c = redis.call('HMGET', key, 'ep', 'ow')
    show(view_drop_execution, id, queue, c[1] or '0', c[2])
    redis.call('HSET', key, 'q', queue, 'ep', 0, 'seq', 0, 'at', 0, 'ma', 1, 'mp', 1, 'dl', 0, 'to', 0, 'ab', 0,
      'ttl', 3600, 'sm', 1, 'en', 0, 'nd', 0, 'sa', 0, 'ft', 0)
    finalize_unowned(id, queue, 'failed', 'corrupt_job', 'the job\'s control hash can\'t be read', iso, now)
    return
  end
  shared('ZREM', k_leases(queue), id)
  shared('ZREM', k_open(queue), id)
  shared('ZREM', k_deadlines(), id)
  show(view_end, id, queue, 'failed', iso, 3600, now, '', '0', nil)
end

-- running → queued, at the front: the job has waited its turn already.
local function requeue(id, queue, owner, epoch)
  redis.call('HSET', k_job(id), 'st', 'queued', 'ow', '')
  shared('ZREM', k_leases(queue), id)
  redis.call('LPUSH', k_rq_queue(queue), id)
  local tenant = redis.call('HGET', k_job(id), 'tn')
  if tenant then tolerantly(tenant_waits, id, queue, tenant, 'LPUSH') end
  show(view_drop_execution, id, queue, epoch, owner)
  if is_hash(k_rq_job(id)) then
    redis.call('HSET', k_rq_job(id), 'status', 'queued', 'worker_name', '')
  end
  redis.call('PUBLISH', k_wake(queue), id)
end

-- What a stock tool did to a job's RQ hash that ends the job: a cancel reason, or ''.
local function stock_verdict(id)
  local status = redis.pcall('HGET', k_rq_job(id), 'status')
  if status == false or type(status) == 'table' then return 'deleted' end
  if status == 'canceled' or status == 'stopped' then return 'cancelled' end
  return ''
end
