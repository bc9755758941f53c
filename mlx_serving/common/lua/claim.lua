-- Takes up to `most` jobs from the queues in priority order; an id is never in neither place.
-- Tenants take turns: a place on the list that is a tenant's goes to the first job in the line of the tenant whose turn it
-- is, however far back on the list that job stands. A tenant that runs as many rows as it may, or as leave no room for the first
-- job in its line, lets its turns pass. A job with more rows than the limit, which was lowered, runs when no other of its tenant does.
-- A young job is left for a moment to another worker that likely has its prompt's beginning and room (see affinity.lua); one
-- of the lane bulk that another worker has the beginning of is taken after those further back that none or this one has.
-- A claim sent again with its nonce takes nothing more: it returns what it took before, as far as that is still this worker's.
-- ARGV: two prefixes, then
--   worker, iso                       its name; the wall clock's time in RQ's form
--   nonce                             names this claim and the attempts that it begins
--   lease_ms
--   protocol                          newest protocol that the worker speaks
--   capacity_tokens, capacity_rows    the most that one job may need here
--   most                              jobs to take; 0: none, neither now nor if the claim itself comes later
--   max_payload_bytes                 of a compressed payload
--   rows, unproven                    rows that the worker holds; those of them that have not shown yet that the engine survives them
--   max_unproven                      the least of what these allow beside them, themselves included; 0: any
--   affinity_ms                       how young a job is that may be left to another worker; 0: none is
--   keeps_prefixes (0|1)              whether this worker has a prefix cache
--   queue …                           in order of priority
-- Returns suspended (0|1), jobs, dropped (ids that had no business on the list), reserved (queue to look into first the next
--   time, or ''), again_ms (when a job that was left is anybody's; 0: none was). A job:
--   id, queue, epoch, seq
--   data                              RQ's payload, compressed; '' if there is a problem
--   problem, problem_field            what is wrong with the job's RQ hash, or ''; in which field
--   signature                         or ''
--   deadline_ms, timeout_ms, stream, result_ttl, enqueued_ms, started_ms, first_token_ms   as in its control hash
--   now_ms                            Redis TIME
--   max_unproven                      as above, of this job
--   adopted (0|1)                     nobody has read yet what its payload asks of the queue (see adopt.lua)
--   runs_alone (0|1)                  whether nothing may run with it until it ends (see losses.lua)
local worker, iso, nonce, lease, protocol, capacity_tokens, capacity_rows, most, max_payload_bytes,
      rows, unproven, max_unproven, affinity_ms, keeps_prefixes = unpack(ARGV, 3, 16)
local FIRST_QUEUE = 17
lease, protocol, capacity_tokens, capacity_rows = tonumber(lease), tonumber(protocol), tonumber(capacity_tokens), tonumber(capacity_rows)
most, max_payload_bytes, affinity_ms = tonumber(most), tonumber(max_payload_bytes), tonumber(affinity_ms)
rows, unproven, max_unproven, keeps_prefixes = tonumber(rows), tonumber(unproven), tonumber(max_unproven), keeps_prefixes == '1'

local ANY = 2 ^ 31
if max_unproven == 0 then max_unproven = ANY end
local RESERVE = {after_ms = 5000, for_ms = 3000}  -- a suspect that has waited so long reserves a worker
local reserved = ''  -- queue of the suspect that this worker makes room for
local LOOK = {page = 64, pages = 16}  -- how far past jobs that are not for this worker it looks
local TENANTS, LINE = 64, 64  -- tenants of a queue asked in one claim; jobs of a line that may be not for this worker
local WALK = 200000  -- list entries that a claim may walk to take jobs out of the middle
local FORBIDDEN = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks',
                   'dependency_ids', 'dependency_id', 'repeats_left', 'rate_limit_key'}
local now = now_ms()
local jobs, taken, dropped = {}, {}, {}  -- the reply's jobs, their ids, and ids that are no jobs of the list
local LEFT = 64  -- jobs that a claim leaves to others at most: what lies behind more of them waits for nobody
local left, left_count, again_ms = {}, 0, 0  -- ids, their number, and when the first of them is anybody's
local OVERTAKE = {most = 32, for_ms = 30000}  -- bulk jobs that a claim takes others before, and how long others may go before one
local gone, walked = {}, 0  -- ids taken out of the list's middle, and what that cost
local orders, looked_at, leaves = {}, {}, {}  -- by queue: tenants to ask; by line: jobs looked at, and whether one was left
shared, shown = gather, gather_view

-- Jobs put on the list by RQ's own Queue.enqueue have no control hash yet.
local function adopt(id, queue)
  redis.call('DEL', k_events(id))  -- of an earlier life: nobody knows what it belongs to
  create_job(id, queue, now, {})
  set_fields(id, {adopted = 1})
  redis.call('ZADD', k_open(queue), int(now), id)
  note_due(id, 0, nil, now)
end

-- What is wrong with a job's RQ hash ('' if nothing) and in which field, its payload, which is read only if it is not too
-- large, and its signature.
local function read_payload(id)
  local key = k_rq_job(id)
  local size = redis.call('HSTRLEN', key, 'data')
  local fits = size > 0 and size <= max_payload_bytes
  local values = redis.call('HMGET', key, SIGNATURE_FIELD, fits and 'data' or SIGNATURE_FIELD, unpack(FORBIDDEN))
  local signature, data = unpack(values, 1, 2)
  signature = signature or ''
  for i, name in ipairs(FORBIDDEN) do
    local value = values[2 + i]
    if value and value ~= '' and value ~= '[]' then return 'forbidden_field', name, '', signature end
  end
  if size == 0 then return 'corrupt_job', 'data', '', signature end
  if not fits then return 'payload_too_large', 'data', '', signature end
  return '', '', data, signature
end

-- Adds a job that this worker runs now to the reply.
local function reply_with(id, queue, epoch, started, job)
  local problem, problem_field, data, signature = read_payload(id)
  if #signature > 256 then signature = 'too long' end
  jobs[#jobs + 1] = {
    id, queue, epoch, job.seq, data, problem, problem_field, signature, job.deadline_ms, job.timeout_ms, job.stream,
    job.result_ttl, job.enqueued_ms, started, job.first_token_ms or '0', int(now), job.max_unproven or '0',
    job.adopted or '0', job.runs_alone and 1 or 0,
  }
  taken[#taken + 1] = id
end

local HELD = field_list('owner', 'nonce')

-- Replies with what this claim took when it was sent before; false if it was not.
local function take_again()
  local ids = redis.pcall('GET', k_claim(nonce))
  if type(ids) ~= 'string' then return false end
  for id in string.gmatch(ids, '%S+') do
    local job = read_sound(id)
    local held = job and read_fields(id, HELD)
    if job and job.state == 'running' and held.owner == worker and held.nonce == nonce then
      local verdict = stock_verdict(id)
      if verdict ~= '' then
        finalize_unowned(id, job.queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
      else
        LOSSES.weigh(id, job, nonce, worker)
        redis.call('ZREM', k_leases(job.queue), '')  -- see renew.lua: a full Redis lets the rest pass
        shared('ZADD', k_leases(job.queue), int(now + lease), id)
        reply_with(id, job.queue, job.epoch, job.started_ms or int(now), job)
      end
    end
  end
  return true
end

-- Notes what the claim took, for a few leases: a command that hangs on its way longer takes jobs that come back by theirs.
local function note_claim()
  if #taken == 0 then redis.call('DEL', k_claim(nonce)) end  -- takes no memory: a full Redis lets the rest pass
  redis.call('SET', k_claim(nonce), table.concat(taken, '\n'), 'PX', int(3 * lease))
end

local function take(id, queue, job)
  local epoch, started = int(job.epoch + 1), job.started_ms or int(now)
  redis.call('HSET', k_job(id), F.state, 'running', F.owner, worker, F.epoch, epoch, F.nonce, nonce, F.started_ms, started)
  if job.runs_alone then set_fields(id, {alone = nonce .. ' ' .. job.seq .. ' ' .. int(now)}) end
  shared('ZADD', k_leases(queue), int(now + lease), id)
  if job.tenant then SHARES.start(id, queue, job) end
  show(view_start, id, queue, epoch, worker, iso, now)
  reply_with(id, queue, epoch, started, job)
  rows, unproven = rows + 1, unproven + 1
  local own = tonumber(job.max_unproven or 0)
  if own > 0 then max_unproven = math.min(max_unproven, own) end
  if job.marks and affinity_ms > 0 and keeps_prefixes then note_holder(job, worker) end
end

-- Suspects of a crash run beside few rows, so that another crash tells more; the last step is to run truly alone.
local function has_room_for(job)
  local own = tonumber(job.max_unproven or 0)
  if own == 1 then return rows == 0 end
  return unproven < math.min(max_unproven, own == 0 and ANY or own)
end

-- A suspect goes first, but waits for a worker that is empty enough. If one has waited too long, one worker of the
-- queue takes nothing more until it fits; the others go on past it.
local function reserve(queue, job)
  if not job.suspect_since_ms or now - job.suspect_since_ms < RESERVE.after_ms then return end
  local holder = redis.call('GET', k_reserved(queue))
  if holder and holder ~= worker then return end
  redis.call('SET', k_reserved(queue), worker, 'PX', RESERVE.for_ms)
  reserved = queue
end

-- Leaves a young job to the worker that has its prefix. Any worker that looks after the bound takes it: nobody waits longer.
-- One that was claimed before has waited, and its worker could not keep it.
local function is_left(id, queue, job)
  local left_ms = job.enqueued_ms + affinity_ms - now
  if not job.marks or left_ms <= 0 or left_ms > affinity_ms or job.epoch ~= '0' then return false end
  if left[id] then return true end
  local place = left_count < LEFT and better_place(job, queue, worker, rows)
  if not place then return false end
  left[id], left_count, place.held = true, left_count + 1, place.held + 1
  again_ms = again_ms == 0 and left_ms or math.min(again_ms, left_ms)
  return true
end

local function is_over() return #jobs >= most or reserved ~= '' or unproven >= max_unproven or walked > WALK end

local function needs_another_worker(job)
  return tonumber(job.min_protocol) > protocol or tonumber(job.needed_tokens) > capacity_tokens or
    tonumber(job.needed_rows or 0) > capacity_rows
end

-- 'take' or 'skip' (leave it for a worker that can) and the job, or 'drop' (it has no business on the list)
local function decide(id, queue)
  local job = read_sound(id)
  if not job then
    if redis.call('EXISTS', k_job(id)) == 1 then
      bury(id, queue, iso, now)
      return 'drop'
    end
    if not is_job_id(id) or not is_hash(k_rq_job(id)) then return 'drop' end
    adopt(id, queue)
    job = read_sound(id)
  end
  if job.queue ~= queue then return 'drop' end  -- a hand put it here; the reconciler puts it back on its own queue's list
  if TERMINAL[job.state] then
    -- A stock requeue of a job that ended: refused, and the view says again what is true.
    local ttl = math.max(redis.call('TTL', k_job(id)), 1)
    show(view_end, id, queue, job.state, iso, ttl, now, '', job.epoch, nil)
    return 'drop'
  end
  if job.state ~= 'queued' then return 'drop' end
  local verdict = stock_verdict(id)
  if verdict ~= '' then
    finalize_unowned(id, queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
    return 'drop'
  end
  local deadline = tonumber(job.deadline_ms)
  if deadline > 0 and deadline <= now then
    finalize_unowned(id, queue, 'expired', 'deadline_exceeded', 'the deadline passed while the job was queued', iso, now)
    return 'drop'
  end
  if needs_another_worker(job) then return 'skip', job end
  LOSSES.weigh(id, job, nonce, worker)
  local is_barred, is_final = LOSSES.is_barred(id, job, nonce, worker, now, lease)
  if is_final then  -- it is on the list by a hand's mistake, or a failover's
    redis.call('ZADD', k_isolated(queue), 'NX', int(now), id)
    if job.tenant then tolerantly(leave_line, id, queue, job.tenant) end
    return 'drop'
  end
  if is_barred then return 'skip', job end
  if not has_room_for(job) then
    reserve(queue, job)
    return 'skip', job
  end
  return is_left(id, queue, job) and 'skip' or 'take', job
end

local function unlist(id, queue)
  walked = walked + take_off_list(id, queue)
  gone[id] = true
end

-- Takes the first job in a tenant's line that is for this worker; false if there is none.
local function serve(queue, tenant)
  local line = line_of(queue, tenant)
  local at = looked_at[line] or 0
  while at < LINE and not is_over() do
    local id = redis.pcall('LINDEX', line, at)
    if type(id) ~= 'string' then return false end
    local verdict, job = decide(id, queue)
    if verdict == 'skip' then
      at = at + 1
      if left[id] then leaves[line] = true end
    elseif verdict == 'take' and not SHARES.fits_limit(job, queue) then return false
    else
      unlist(id, queue)
      if verdict == 'take' then
        take(id, queue, job)
        looked_at[line] = at
        return true
      end
      leave_line(id, queue, tenant)
      dropped[#dropped + 1] = id
    end
  end
  return false
end

local function pass_turn(queue, tenant)
  if redis.call('LREM', k_turns(queue), 1, tenant) == 1 and redis.call('EXISTS', line_of(queue, tenant)) == 1 then
    redis.call('RPUSH', k_turns(queue), tenant)
  end
end

-- Takes one job of the tenant whose turn it is; false if none of those asked has one that may run here.
local function serve_turn(queue)
  local order = orders[queue]
  while #order > 0 and not is_over() do
    local tenant = table.remove(order, 1)
    local served = SHARES.may_run(tenant, queue) and serve(queue, tenant)
    -- A job that is left for a moment costs its tenant no turn.
    if served or not leaves[line_of(queue, tenant)] then pass_turn(queue, tenant) end
    if served then
      order[#order + 1] = tenant
      return true
    end
  end
  return false
end

-- Gives a tenant's place on the list away, until its own job has gone too or nobody may run another one.
local function give_place(id, queue, verdict, job)
  if not orders[queue] then
    local tenants = redis.pcall('LRANGE', k_turns(queue), 0, TENANTS - 1)
    orders[queue] = tenants.err and {} or tenants
  end
  while not gone[id] and serve_turn(queue) do end
  if gone[id] or is_over() then return end
  -- In no line, or behind more than are looked at, and yet it may run.
  if verdict == 'take' and SHARES.may_run(job.tenant, queue) and has_room_for(job) and SHARES.fits_limit(job, queue) then
    unlist(id, queue)
    take(id, queue, job)
  end
end

local function unlist_front(id, queue, verdict, job)
  redis.call('LREM', k_rq_queue(queue), 1, id)
  if verdict == 'take' then take(id, queue, job) else dropped[#dropped + 1] = id end
end

-- Whether others may go before a job: in bulk, which waits anyway, if another worker has its beginning. Nobody is idle for that.
local function may_be_overtaken(queue, job, overtaken)
  if not job.marks or job.tenant or affinity_ms == 0 or job.epoch ~= '0' or #overtaken >= OVERTAKE.most then return false end
  if string.sub(queue, -5) ~= ':bulk' then return false end
  local since = now - (tonumber(job.overtaken_ms or '') or now)
  return since >= 0 and since < OVERTAKE.for_ms and is_elsewhere(job, queue, worker)
end

-- `taken_before`: jobs that were taken until then; `is_noted`: whether its control hash says already that it was overtaken.
local function set_aside(id, job, overtaken)
  overtaken[#overtaken + 1] = {id = id, taken_before = #jobs, is_noted = job.overtaken_ms}
end

local GLANCE = field_list('marks', 'tenant', 'epoch', 'overtaken_ms')

-- The same at a glance: behind one that was overtaken there are likely more.
local function is_overtaken_too(id, queue, overtaken)
  if #overtaken == 0 then return false end
  local ok, job = pcall(read_fields, id, GLANCE)
  if not ok or not may_be_overtaken(queue, job, overtaken) then return false end
  set_aside(id, job, overtaken)
  return true
end

-- Takes those that were overtaken while there is room; notes when one first was.
local function take_overtaken(queue, overtaken)
  local overtakers = #jobs
  for _, each in ipairs(overtaken) do
    if not is_over() then
      local verdict, job = decide(each.id, queue)
      if verdict ~= 'skip' then unlist_front(each.id, queue, verdict, job) end
    elseif each.taken_before < overtakers and not each.is_noted then
      set_fields(each.id, {overtaken_ms = int(now)})
    end
  end
end

local function claim(queue)
  local offset, overtaken = 0, {}
  local list = k_rq_queue(queue)
  for _ = 1, LOOK.pages do
    if is_over() then break end
    local ids = redis.pcall('LRANGE', list, offset, offset + LOOK.page - 1)
    if #ids == 0 then break end
    for _, id in ipairs(ids) do
      if is_over() then break end
      if gone[id] then  -- no longer on the list
      elseif SHARES.is_held_back(id, queue) then offset = offset + 1
      elseif is_overtaken_too(id, queue, overtaken) then offset = offset + 1
      else
        local verdict, job = decide(id, queue)
        if verdict ~= 'drop' and job.tenant then give_place(id, queue, verdict, job)
          if not gone[id] then offset = offset + 1 end
        elseif verdict == 'skip' then offset = offset + 1
        elseif verdict == 'take' and may_be_overtaken(queue, job, overtaken) then
          set_aside(id, job, overtaken)
          offset = offset + 1
        else unlist_front(id, queue, verdict, job) end
      end
    end
  end
  take_overtaken(queue, overtaken)
end

local is_plain = redis.call('EXISTS', k_claim(nonce), k_rq_suspended()) == 0  -- neither: one look for both
if not is_plain and take_again() then
  write_gathered()
elseif not is_plain and most > 0 and redis.call('GET', k_rq_suspended()) then
  return answer({1, {}, {}, '', 0})
else
  -- Whatever goes wrong at a job, those that were taken before it have their leases.
  local ok, problem = pcall(function() for at = FIRST_QUEUE, #ARGV do claim(ARGV[at]) end end)
  write_gathered()
  if #jobs > 0 or most == 0 then note_claim() end
  if not ok then raise(problem) end
end
return answer({0, jobs, dropped, reserved, math.ceil(again_ms)})
