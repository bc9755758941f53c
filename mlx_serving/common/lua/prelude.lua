-- Shared by every script. Follows the generated names (`k_<key>()`, `F.<field>`, …), quarantine.lua and tenants.lua.
-- The control hash is the authority and is written first; RQ's hash and registries are a view
-- of it, written in the same script, so they can never disagree through a crash.
-- `job` is always a control hash that `read_fields` or its kin read: values by the names of their fields.

local unpack = unpack or table.unpack
-- Scripts look these up with each use: as locals that costs less.
local redis, string, table, ipairs, pairs, pcall, type, tonumber = redis, string, table, ipairs, pairs, pcall, type, tonumber

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function int(x) return string.format('%.0f', x) end

-- A misspelled field is an error, not a nil that a command would take for something else.
for _, names in ipairs({F, ENTRY, LIMIT}) do
  setmetatable(names, {__index = function(_, name) error('no field is named ' .. tostring(name)) end})
end

-- A stock tool may have left anything under a key; one odd key must stop nobody.
local function is_hash(key) return redis.call('TYPE', key).ok == 'hash' end

local RQ_STATUS = {queued = 'queued', running = 'started', finished = 'finished', failed = 'failed',
                   dead = 'failed', expired = 'failed', cancelled = 'canceled'}
local TERMINAL = {finished = true, failed = true, dead = true, expired = true, cancelled = true}
local OPEN = {queued = true, running = true}

-- Fields that are read together: their names, and the names that they are stored by.
local function field_list(...)
  local names, stored = {...}, {}
  for i, name in ipairs(names) do stored[i] = F[name] end
  return {names = names, stored = stored}
end

-- A job's fields by their names; one that is not there is false.
local function read_fields(id, list)
  local values, job = redis.call('HMGET', k_job(id), unpack(list.stored)), {}
  for i, name in ipairs(list.names) do job[name] = values[i] end
  return job
end

-- The same for a key that may hold anything: an empty table if it is no hash.
local function find_fields(id, list)
  return is_hash(k_job(id)) and read_fields(id, list) or {}
end

-- Writes fields, given by their names, in one call.
local function set_fields(id, fields)
  local flat = {}
  for name, value in pairs(fields) do flat[#flat + 1], flat[#flat + 2] = F[name], value end
  if #flat > 0 then redis.call('HSET', k_job(id), unpack(flat)) end
end

-- Writes a new job's control hash. `terms`: what its producer says; what is left out is as for a job of RQ's own tools.
local function create_job(id, queue, now, terms)
  redis.call('HSET', k_job(id), F.state, 'queued', F.queue, queue, F.epoch, 0, F.owner, terms.owner or '', F.seq, 0, F.crashes, 0,
    F.max_attempts, terms.max_attempts or 2, F.min_protocol, terms.min_protocol or 1, F.deadline_ms, terms.deadline_ms or 0,
    F.timeout_ms, terms.timeout_ms or 0, F.abandon_ms, terms.abandon_ms or 0, F.result_ttl, terms.result_ttl or 3600,
    F.queued_ttl, terms.queued_ttl or DEFAULT.queued_ttl, F.events_ttl, terms.events_ttl or DEFAULT.events_ttl,
    F.failed_ttl, terms.failed_ttl or DEFAULT.failed_ttl, F.stream, terms.stream or 1,
    F.cancel_reason, terms.cancel_reason or '', F.enqueued_ms, int(now), F.needed_tokens, 0)
  if terms.marks then redis.call('HSET', k_job(id), F.marks, terms.marks) end
  if terms.tenant then redis.call('HSET', k_job(id), F.tenant, terms.tenant) end
  if terms.digest then redis.call('HSET', k_job(id), F.digest, terms.digest) end
  if terms.rows then redis.call('HSET', k_job(id), F.rows, terms.rows) end
end

-- Notes when a job that waits from now on ends if nobody takes it: at its deadline (0: none), or after its queued_ttl.
local function note_due(id, deadline_ms, queued_ttl, now)
  local due = now + 1000 * (tonumber(queued_ttl) or tonumber(DEFAULT.queued_ttl))
  if deadline_ms > 0 then due = math.min(due, deadline_ms) end
  redis.call('ZADD', k_deadlines(), int(due), id)
end

-- RQ's own rule for ids. Anybody may have pushed anything: bytes that are no text, a ':' (which
-- would read as another attempt's name), a line break for a log.
local function is_job_id(id) return #id > 0 and #id <= 256 and not string.find(id, '[^%w_-]') end

local TEXTS, NUMBERS, LATER_NUMBERS, SOUND  -- lists of fields, once `read_sound` needs them; SOUND: all, as they are stored

local function list_sound()
  TEXTS = {'state', 'queue', 'owner', 'cancel_reason', 'tenant', 'marks', 'losses'}
  NUMBERS = {'epoch', 'seq', 'crashes', 'max_attempts', 'min_protocol', 'deadline_ms', 'timeout_ms', 'abandon_ms', 'result_ttl',
             'stream', 'enqueued_ms', 'needed_tokens'}
  LATER_NUMBERS = {'started_ms', 'first_token_ms', 'max_unproven', 'suspect_since_ms', 'needed_rows',
                   'overtaken_ms', 'rows', 'adopted',
                   'queued_ttl', 'events_ttl', 'failed_ttl'}  -- not there from the start, or with a default
  SOUND = {}
  for _, names in ipairs({TEXTS, NUMBERS, LATER_NUMBERS}) do
    for _, name in ipairs(names) do SOUND[#SOUND + 1] = F[name] end
  end
end

-- Reads a control hash that the script will do arithmetic with; nil if it does not read as one of ours.
local function read_sound(id)
  if not is_job_id(id) then return nil end
  if not SOUND then list_sound() end
  local values = redis.pcall('HMGET', k_job(id), unpack(SOUND))
  if redis.is_odd(values) then return nil end
  local job, before = {}, #TEXTS
  for i, name in ipairs(TEXTS) do job[name] = values[i] or nil end
  if not (OPEN[job.state] or TERMINAL[job.state]) then return nil end
  if not (job.queue and job.owner and job.cancel_reason) then return nil end
  for i, name in ipairs(NUMBERS) do
    local value = values[before + i]
    -- up to 15 digits are exact as a Lua number
    if not value or #value > 15 or not string.find(value, '^%d+$') then return nil end
    job[name] = value
  end
  before = before + #NUMBERS
  for i, name in ipairs(LATER_NUMBERS) do
    local value = values[before + i]
    if value then
      if #value > 15 or not string.find(value, '^%d+$') then return nil end
      job[name] = value
    end
  end
  return job
end

local function is_sound(id) return read_sound(id) ~= nil end

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
  local slice = 1000  -- arguments of a call at most: Lua's stack holds no more than some thousands. Even, for pairs
  for _, group in ipairs(gathered) do
    local call, command, key = group.view and redis.pcall or redis.call, group[1], group[2]
    local deletes = command == 'DEL'
    for at = deletes and 2 or 3, #group, slice do
      local last = math.min(at + slice - 1, #group)
      if deletes then call(command, unpack(group, at, last)) else call(command, key, unpack(group, at, last)) end
    end
  end
end

-- Whether a job's attempt is the one that a worker speaks of. Redis may forget a claim (a failover, a power loss) and give
-- the same epoch again, to the same worker too. `job`: `attempt_fields` at least.
local function is_attempt(job, epoch, nonce) return job.epoch == epoch and job.nonce == nonce end

local function runs(job, worker, epoch, nonce)
  return job.state == 'running' and job.owner == worker and job.queue and is_attempt(job, epoch, nonce)
end

-- Fields that tell an attempt, and more.
local function attempt_fields(...) return field_list('state', 'epoch', 'owner', 'nonce', 'queue', ...) end

-- Which terminal state a cancel reason leads to.
local function state_for(reason)
  if reason == 'deadline_exceeded' or reason == 'timeout' or reason == 'abandoned' then return 'expired' end
  return 'cancelled'
end

-- Takes an id off its queue's list, from the end that is nearer: the index of open jobs has them in nearly the list's order.
-- Returns about how many entries that walked.
local function take_off_list(id, queue)
  local rank, open = redis.call('ZRANK', k_open(queue), id), redis.call('ZCARD', k_open(queue))
  local behind = rank and open - rank or open
  redis.call('LREM', k_rq_queue(queue), (rank and behind < rank) and -1 or 1, id)
  return math.min(rank or open, behind)
end

-- RQ names the execution of one attempt by the job and its epoch.
local function execution_of(id, epoch) return id .. ':' .. epoch end

local function view_drop_execution(id, queue, epoch, owner)
  local execution = execution_of(id, epoch)
  shown('DEL', k_rq_execution(execution), k_rq_executions(id))
  shown('ZREM', k_rq_started(queue), execution)
  if owner and owner ~= '' then shown('SREM', k_rq_worker_executions(owner), execution) end
end

local function view_start(id, queue, epoch, worker, iso, now)
  local execution = execution_of(id, epoch)
  redis.call('HSET', k_rq_job(id), 'status', 'started', 'worker_name', worker,
             'started_at', iso, 'last_heartbeat', iso)
  redis.call('PERSIST', k_rq_job(id))
  redis.call('HSET', k_rq_execution(execution), 'id', epoch, 'job_id', id,
             'created_at', now / 1000, 'last_heartbeat', now / 1000, 'worker_name', worker)
  -- Scored +inf: stock maintenance, which goes by its wall clock, never ends a lease.
  redis.call('ZADD', k_rq_executions(id), '+inf', epoch)
  shown('ZADD', k_rq_started(queue), '+inf', execution)
  shown('SADD', k_rq_worker_executions(worker), execution)
end

local REGISTRIES = {finished = k_rq_finished, failed = k_rq_failed, canceled = k_rq_canceled}  -- by RQ's status
local RQ_SUCCESSFUL, RQ_FAILED = 1, 2  -- `rq.results.Result.Type`

-- `rq_result`: nil, or {type, value}: RQ_SUCCESSFUL with a base64 text, or RQ_FAILED with base64 of zlib.
local function view_end(id, queue, state, iso, ttl, now, worker, epoch, rq_result)
  local key = k_rq_job(id)
  if redis.call('EXPIRE', key, ttl) == 0 then return end  -- there is none
  local status = RQ_STATUS[state]
  redis.call('HSET', key, 'status', status, 'ended_at', iso)
  for shows, registry in pairs(REGISTRIES) do
    if shows == status then shown('ZADD', registry(queue), int(math.floor(now / 1000) + ttl), id)
    else shown('ZREM', registry(queue), id) end
  end
  if rq_result then
    local fields = {'type', rq_result.type, 'worker_name', worker, 'execution_id', epoch}
    fields[#fields + 1] = rq_result.type == RQ_SUCCESSFUL and 'return_value' or 'exc_string'
    fields[#fields + 1] = rq_result.value
    redis.call('XADD', k_rq_results(id), 'MAXLEN', 10, '*', unpack(fields))
    redis.call('EXPIRE', k_rq_results(id), ttl)
  end
end

-- What the events of an attempt carry of its nonce. Events that a script writes have no attempt: the time tells them from
-- what is written under the same seq if Redis forgets them.
local function tag_of(nonce) return string.sub(nonce, 1, TAG_CHARS) end
local function tag_of_script(now) return string.format('%08x', now % 4294967296) end

-- An event is its attempt's epoch, its writer's tag, its seq and its body, the JSON after EVENT_OPENING. `form` says how the
-- body is stored and given: ENTRY.body whole, ENTRY.tokens without TOKENS_OPENING. Readers put back what is left out
-- (`stored_events.py`), so that a replay is byte for byte what was published.
local function entry_of(epoch, tag, form, body) return {ENTRY.writer, epoch .. '-' .. tag, form, body} end

local function append_event(id, seq, entry)
  redis.call('XADD', k_events(id), int(seq) .. '-0', unpack(entry))
end

-- Returns how many listened.
local function publish_event(id, epoch, tag, seq, form, body)
  local opening = string.format(EVENT_OPENING, epoch, tag, int(seq))
  if form == ENTRY.tokens then opening = opening .. TOKENS_OPENING end
  return redis.call('PUBLISH', k_channel(id), opening .. body)
end

-- How many seconds the keys of a job that ends are kept, and how many its events.
local function kept_for(job, state, has_result)
  local ttl = tonumber(job.result_ttl or '') or 3600
  if state == 'failed' or state == 'dead' then  -- its payload, for a requeue
    ttl = math.max(ttl, tonumber(job.failed_ttl or DEFAULT.failed_ttl))
  end
  if not has_result then return ttl, ttl end  -- its events are its only output
  return ttl, math.min(ttl, tonumber(job.events_ttl or DEFAULT.events_ttl))
end

-- Ends a job. The end event itself was appended by the caller; `fields`: what else its control hash is to say; `known`:
-- its tenant, rows and how long it is kept, if the caller has read them.
local function finalize(id, queue, state, code, message, result, iso, now, owner, epoch, rq_result, fields, known)
  local key = k_job(id)
  local job = known or read_fields(id, field_list('result_ttl', 'events_ttl', 'failed_ttl', 'tenant', 'rows'))
  local ttl, events_ttl = kept_for(job, state, result ~= '')
  fields = fields or {}
  fields.state, fields.finished_ms, fields.error_code, fields.message = state, int(now), code, message
  if result ~= '' then fields.result = result end
  set_fields(id, fields)
  shared('ZREM', k_leases(queue), id)
  shared('ZREM', k_open(queue), id)
  shared('ZREM', k_deadlines(), id)
  redis.call('EXPIRE', key, ttl)
  redis.call('EXPIRE', k_events(id), events_ttl)
  if job.tenant then tolerantly(tenant_ends, id, queue, job.tenant, rows_of(job)) end
  show(view_drop_execution, id, queue, epoch, owner)
  show(view_end, id, queue, state, iso, ttl, now, owner, epoch, rq_result)
end

-- Ends a job that no live worker holds: the script itself writes the end event.
local function finalize_unowned(id, queue, state, code, message, iso, now)
  local job = read_fields(id, field_list('seq', 'epoch', 'owner'))
  local seq, epoch, tag = (tonumber(job.seq) or 0) + 1, int(tonumber(job.epoch) or 0), tag_of_script(now)
  local body = '"type":"end","state":"' .. state .. '","error":{"code":"' .. code .. '","message":' ..
    cjson.encode(message) .. ',"retryable":false}}'
  local kind = redis.call('TYPE', k_events(id)).ok
  if kind ~= 'stream' and kind ~= 'none' then quarantine(k_events(id)) end
  if pcall(append_event, id, seq, entry_of(epoch, tag, ENTRY.body, body)) then  -- fails if the stream is ahead of the hash
    set_fields(id, {seq = int(seq)})
    pcall(publish_event, id, epoch, tag, seq, ENTRY.body, body)
  end
  finalize(id, queue, state, code, message, '', iso, now, job.owner or '', job.epoch or '0', nil)
  redis.call('ZREM', k_isolated(queue), id)
end

-- Ends a job that no live worker holds as its cancel reason says; returns the state.
local function finalize_cancelled(id, queue, reason, iso, now)
  local state = state_for(reason)
  finalize_unowned(id, queue, state, state == 'expired' and reason or 'cancelled', reason, iso, now)
  return state
end

-- Ends a job whose control hash is not sound, so that it stops nobody else.
local function bury(id, queue, iso, now)
  local key = k_job(id)
  local kind = redis.call('TYPE', key).ok
  local problem = kind ~= 'hash' and kind ~= 'none' and quarantine(key)
  if problem then raise(problem) end
  if kind ~= 'none' then
    local job = read_fields(id, field_list('epoch', 'owner', 'cancel_reason', 'queue'))
    queue = job.queue or queue
    show(view_drop_execution, id, queue, job.epoch or '0', job.owner)
    create_job(id, queue, 0, {max_attempts = 1, owner = job.owner, cancel_reason = job.cancel_reason})
    set_fields(id, {started_ms = 0, first_token_ms = 0})
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
  redis.call('HSET', k_job(id), F.state, 'queued', F.owner, '')
  shared('ZREM', k_leases(queue), id)
  redis.call('LPUSH', k_rq_queue(queue), id)
  local job = read_fields(id, field_list('tenant', 'rows', 'deadline_ms', 'queued_ttl'))
  tolerantly(note_due, id, tonumber(job.deadline_ms or 0), job.queued_ttl, now_ms())
  if job.tenant then
    tolerantly(move_rows, 'SREM', id, job.tenant, rows_of(job))
    tolerantly(tenant_waits, id, queue, job.tenant, 'LPUSH')
  end
  show(view_drop_execution, id, queue, epoch, owner)
  if is_hash(k_rq_job(id)) then
    redis.call('HSET', k_rq_job(id), 'status', 'queued', 'worker_name', '')
  end
  redis.call('PUBLISH', k_wake(queue), id)
end

-- What a stock tool did to a job's RQ hash that ends the job: a cancel reason, or ''.
local function stock_verdict(id)
  local status = redis.pcall('HGET', k_rq_job(id), 'status')
  local odd = redis.is_odd(status)
  if odd then quarantine(k_rq_job(id)) end
  if odd or not status then return 'deleted' end
  if status == 'canceled' or status == 'stopped' then return 'cancelled' end
  return ''
end

-- Ends a job that somebody cancelled while it ran, by RQ's tools too; returns the state, or nil if nobody did.
-- `job`: its queue and cancel_reason.
local function end_cancelled(id, job, iso, now)
  if job.cancel_reason and job.cancel_reason ~= '' then return finalize_cancelled(id, job.queue, job.cancel_reason, iso, now) end
  local verdict = stock_verdict(id)
  if verdict == '' then return nil end
  finalize_unowned(id, job.queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
  return 'cancelled'
end
