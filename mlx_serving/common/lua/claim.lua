-- Takes up to `most` jobs from the queues in priority order; an id is never in neither place.
-- Tenants take turns: a place on the list that is a tenant's goes to the first job in the line of the tenant whose turn it
-- is, wherever on the list that job stands. A tenant that runs as many jobs as it may lets its turns pass.
-- A young job is left for a moment to another worker that likely has its prompt's beginning and room (see affinity.lua); one
-- of the lane bulk that another worker has the beginning of is taken after those further back that none or this one has.
-- A claim sent again with its nonce takes nothing more: it returns what it took before, as far as that is still this worker's.
-- ARGV: P R worker iso nonce lease_ms protocol capacity_tokens capacity_rows most max_payload_bytes rows unproven company affinity_ms
--   keeps_prefixes queue …
--   nonce: names this claim and the attempts that it begins; most: 0 takes nothing, neither now nor if the claim itself comes later;
--   capacity: the most that one job may need here; rows: that the worker holds; unproven: those of them that have not shown yet that the engine survives them;
--   company: the least of what these allow beside them, themselves included (0: any);
--   affinity_ms: how young (0: none is left); keeps_prefixes: 1 where this worker has a prefix cache.
-- Returns {suspended 0|1, {job …}, {dropped id …}, queue to look into first the next time or '',
--   ms after which a job that was left is anybody's (0: none was)}; a job is
--   {id, queue, epoch, seq, data, problem, signature, deadline_ms, timeout_ms, stream, result_ttl, enqueued_ms, started_ms, first_token_ms, now_ms, company}.
local worker, iso, nonce, lease = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local protocol, capacity, capacity_rows = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local most, max_payload = tonumber(ARGV[10]), tonumber(ARGV[11])
local rows, unproven, company = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local patience, keeps_prefixes = tonumber(ARGV[15]), ARGV[16] == '1'
local QUEUES = 17  -- where they begin in ARGV

local ANY = 2 ^ 31
if company == 0 then company = ANY end
local STARVED_MS, RESERVED_MS = 5000, 3000
local reserved = ''  -- queue of the suspect that this worker makes room for
local PAGE, PAGES = 64, 16  -- how far past jobs that are not for this worker it looks
local TENANTS, LINE = 64, 64  -- tenants of a queue asked in one claim; jobs of a line that may be not for this worker
local WALK = 200000  -- list entries that a claim may walk to take jobs out of the middle
local FORBIDDEN = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks',
                   'dependency_ids', 'dependency_id', 'repeats_left', 'rate_limit_key'}
local now = now_ms()
local jobs, dropped = {}, {}
local LEFT = 64  -- jobs that a claim leaves to others at most: what lies behind more of them waits for nobody
local left, lefts, again = {}, 0, 0  -- ids, their number, and when the first of them is anybody's
local PASSED, PASSED_MS = 32, 30000  -- bulk jobs that a claim takes others before, and how long others may go before one
local gone, walked = {}, 0  -- ids taken out of the list's middle, and what that cost
local orders, passed, room = {}, {}, {}  -- by queue: tenants to ask; by line: jobs looked at; by tenant: jobs it may start
shared, shown = gather, gather_view

-- Jobs put on the list by RQ's own Queue.enqueue have no control hash yet.
local function adopt(id, queue)
  redis.call('DEL', k_events(id))  -- of an earlier life: nobody knows what it belongs to
  redis.call('HSET', k_job(id), 'st', 'queued', 'q', queue, 'ep', 0, 'ow', '', 'seq', 0, 'at', 0, 'ma', 2,
    'mp', 1, 'dl', 0, 'to', 0, 'ab', 0, 'ttl', 3600, 'sm', 1, 'ca', '', 'en', int(now), 'nd', 0)
  redis.call('ZADD', k_open(queue), int(now), id)
end

-- What is wrong with a job's RQ hash ('' if nothing), its payload, which is read only where it is not too large, and
-- its signature.
local function read_payload(id)
  local key = k_rq_job(id)
  local size = redis.call('HSTRLEN', key, 'data')
  local fits = size > 0 and size <= max_payload
  local values = redis.call('HMGET', key, 'mlxs_sig', fits and 'data' or 'mlxs_sig', unpack(FORBIDDEN))
  local signature = values[1] or ''
  for i, name in ipairs(FORBIDDEN) do
    local value = values[i + 2]
    if value and value ~= '' and value ~= '[]' then return 'forbidden_field:' .. name, '', signature end
  end
  if size == 0 then return 'corrupt_job:data', '', signature end
  if not fits then return 'payload_too_large:data', '', signature end
  return '', values[2], signature
end

-- Adds a job that this worker runs now to the reply.
local function reply_with(id, queue, epoch, started, c)
  local problem, data, signature = read_payload(id)
  if #signature > 256 then signature = 'too long' end
  jobs[#jobs + 1] = {id, queue, epoch, c.seq, data, problem, signature, c.dl, c.to, c.sm, c.ttl, c.en, started, c.ft or '0', int(now), c.co or '0'}
end

-- Replies with what this claim took when it was sent before; false where it was not.
local function take_again()
  local ids = redis.pcall('GET', k_claim(nonce))
  if type(ids) ~= 'string' then return false end
  for id in string.gmatch(ids, '%S+') do
    local c = sound_fields(id)
    local h = c and redis.call('HMGET', k_job(id), 'ow', 'no')
    if c and c.st == 'running' and h[1] == worker and h[2] == nonce then
      local verdict = stock_verdict(id)
      if verdict ~= '' then
        finalize_unowned(id, c.q, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
      else
        redis.call('ZREM', k_leases(c.q), '')  -- see renew.lua: a full Redis lets the rest pass
        shared('ZADD', k_leases(c.q), int(now + lease), id)
        reply_with(id, c.q, c.ep, c.sa or int(now), c)
      end
    end
  end
  return true
end

-- Notes what the claim took, for a few leases: a command that hangs on its way longer takes jobs that come back by theirs.
local function note_claim()
  local ids = {}
  for i, job in ipairs(jobs) do ids[i] = job[1] end
  if #ids == 0 then redis.call('DEL', k_claim(nonce)) end  -- takes no memory: a full Redis lets the rest pass
  redis.call('SET', k_claim(nonce), table.concat(ids, '\n'), 'PX', int(3 * lease))
end

local function take(id, queue, c)
  local epoch, started = int(c.ep + 1), c.sa or int(now)
  redis.call('HSET', k_job(id), 'st', 'running', 'ow', worker, 'ep', epoch, 'no', nonce, 'sa', started)
  shared('ZADD', k_leases(queue), int(now + lease), id)
  if c.tn then
    tolerantly(tenant_runs, id, queue, c.tn)
    if room[c.tn] then room[c.tn] = room[c.tn] - 1 end
  end
  show(view_start, id, queue, epoch, worker, iso, now)
  reply_with(id, queue, epoch, started, c)
  rows, unproven = rows + 1, unproven + 1
  if tonumber(c.co or 0) > 0 then company = math.min(company, tonumber(c.co)) end
  if c.af and patience > 0 and keeps_prefixes then note_holder(c, worker) end
end

-- Suspects of a crash run in small company, so that another crash tells more; the last step is to run truly alone.
local function has_room_for(c)
  local own = tonumber(c.co or 0)
  if own == 1 then return rows == 0 end
  return unproven < math.min(company, own == 0 and ANY or own)
end

-- A suspect goes first, but waits for a worker that is empty enough. Where one has waited too long, one worker of the
-- queue takes nothing more until it fits; the others go on past it.
local function reserve(queue, c)
  if not c.su or now - c.su < STARVED_MS then return end
  local holder = redis.call('GET', k_reserved(queue))
  if holder and holder ~= worker then return end
  redis.call('SET', k_reserved(queue), worker, 'PX', RESERVED_MS)
  reserved = queue
end

-- Leaves a young job to the worker that has its prefix. Whoever looks after the bound takes it: nobody waits longer.
-- One that was claimed before has waited, and its worker could not keep it.
local function is_left(id, queue, c)
  local over = c.en + patience - now
  if not c.af or over <= 0 or over > patience or c.ep ~= '0' then return false end
  if left[id] then return true end
  local place = lefts < LEFT and better_place(c, queue, worker, rows)
  if not place then return false end
  left[id], lefts, place.held = true, lefts + 1, place.held + 1
  again = again == 0 and over or math.min(again, over)
  return true
end

local function is_over() return #jobs >= most or reserved ~= '' or unproven >= company or walked > WALK end

-- 'take' or 'skip' (leave it for a worker that can) and its control fields, or 'drop' (it has no business on the list)
local function decide(id, queue)
  local c = sound_fields(id)
  if not c then
    if redis.call('EXISTS', k_job(id)) == 1 then
      bury(id, queue, iso, now)
      return 'drop'
    end
    if not is_job_id(id) or not is_hash(k_rq_job(id)) then return 'drop' end
    adopt(id, queue)
    c = sound_fields(id)
  end
  if TERMINAL[c.st] then
    -- A stock requeue of a job that ended: refused, and the view says again what is true.
    local ttl = math.max(redis.call('TTL', k_job(id)), 1)
    show(view_end, id, queue, c.st, iso, ttl, now, '', c.ep, nil)
    return 'drop'
  end
  if c.st ~= 'queued' then return 'drop' end
  local verdict = stock_verdict(id)
  if verdict ~= '' then
    finalize_unowned(id, queue, 'cancelled', 'cancelled', 'the RQ job was ' .. verdict, iso, now)
    return 'drop'
  end
  local deadline = tonumber(c.dl)
  if deadline > 0 and deadline <= now then
    finalize_unowned(id, queue, 'expired', 'deadline_exceeded', 'the deadline passed while the job was queued', iso, now)
    return 'drop'
  end
  if tonumber(c.mp) > protocol or tonumber(c.nd) > capacity or tonumber(c.nr or 0) > capacity_rows then return 'skip', c end
  if not has_room_for(c) then
    reserve(queue, c)
    return 'skip', c
  end
  return is_left(id, queue, c) and 'skip' or 'take', c
end

-- Takes an id off the list, from the end that is nearer: the index of open jobs has them in nearly the list's order.
local function unlist(id, queue)
  local rank, open = redis.call('ZRANK', k_open(queue), id), redis.call('ZCARD', k_open(queue))
  local behind = rank and open - rank or open
  walked = walked + math.min(rank or open, behind)
  redis.call('LREM', k_rq_queue(queue), (rank and behind < rank) and -1 or 1, id)
  gone[id] = true
end

local function may_run(tenant)
  if not room[tenant] then
    local limit = limit_of(tenant, 'running')
    room[tenant] = limit and limit - members_of(k_tenant_running(tenant)) or ANY
  end
  return room[tenant] > 0
end

-- Takes the first job in a tenant's line that is for this worker; false where there is none.
local function serve(queue, tenant)
  local line = line_of(queue, tenant)
  local at = passed[line] or 0
  while at < LINE and not is_over() do
    local id = redis.pcall('LINDEX', line, at)
    if type(id) ~= 'string' then return false end
    local verdict, c = decide(id, queue)
    if verdict == 'skip' then at = at + 1
    else
      unlist(id, queue)
      if verdict == 'take' then
        take(id, queue, c)
        passed[line] = at
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

-- One job of the tenant whose turn it is; false where none of those asked has one that may run here.
local function serve_turn(queue)
  local order = orders[queue]
  while #order > 0 and not is_over() do
    local tenant, before = table.remove(order, 1), lefts
    local served = may_run(tenant) and serve(queue, tenant)
    if served or lefts == before then pass_turn(queue, tenant) end  -- what is left for a moment costs no turn
    if served then
      order[#order + 1] = tenant
      return true
    end
  end
  return false
end

-- Gives a tenant's place on the list away, until its own job has gone too or nobody may run another one.
local function give_place(id, queue, verdict, c)
  if not orders[queue] then
    local found = redis.pcall('LRANGE', k_turns(queue), 0, TENANTS - 1)
    orders[queue] = found.err and {} or found
  end
  while not gone[id] and serve_turn(queue) do end
  if gone[id] or is_over() then return end
  -- In no line, or behind more than are looked at, and yet it may run.
  if verdict == 'take' and may_run(c.tn) and has_room_for(c) then
    unlist(id, queue)
    take(id, queue, c)
  end
end

-- Whether the job is one of a tenant that was seen to run as many as it may: not worth a closer look.
local function is_held_back(id)
  if not next(room) then return false end
  local tenant = redis.pcall('HGET', k_job(id), 'tn')
  return type(tenant) == 'string' and room[tenant] ~= nil and room[tenant] <= 0
end

local function unlist_front(id, queue, verdict, c)
  redis.call('LREM', k_rq_queue(queue), 1, id)
  if verdict == 'take' then take(id, queue, c) else dropped[#dropped + 1] = id end
end

-- Whether others may go before a job: in bulk, which waits anyway, and where another worker has its beginning. Nobody is idle for that.
local function is_passed(queue, c, passed)
  if not c.af or c.tn or patience == 0 or c.ep ~= '0' or #passed >= PASSED or string.sub(queue, -5) ~= ':bulk' then return false end
  local since = now - (tonumber(c.po or '') or now)
  return since >= 0 and since < PASSED_MS and is_elsewhere(c, queue, worker)
end

local function pass(id, c, passed) passed[#passed + 1] = {id = id, jobs = #jobs, noted = c.po} end

-- The same at a glance: behind one that was passed there are likely more.
local function is_passed_too(id, queue, passed)
  if #passed == 0 then return false end
  local f = redis.pcall('HMGET', k_job(id), 'af', 'tn', 'ep', 'po')
  local c = not f.err and {af = f[1], tn = f[2], ep = f[3], po = f[4] or nil}
  if not c or not is_passed(queue, c, passed) then return false end
  pass(id, c, passed)
  return true
end

-- Takes those that were passed while there is room; notes when one was first overtaken.
local function take_passed(queue, passed)
  local overtakers = #jobs
  for _, p in ipairs(passed) do
    if not is_over() then
      local verdict, c = decide(p.id, queue)
      if verdict ~= 'skip' then unlist_front(p.id, queue, verdict, c) end
    elseif p.jobs < overtakers and not p.noted then
      redis.call('HSET', k_job(p.id), 'po', int(now))
    end
  end
end

local function claim(queue)
  local offset, passed = 0, {}
  local list = k_rq_queue(queue)
  for _ = 1, PAGES do
    if is_over() then break end
    local ids = redis.pcall('LRANGE', list, offset, offset + PAGE - 1)
    if #ids == 0 then break end
    for _, id in ipairs(ids) do
      if is_over() then break end
      if gone[id] then  -- no longer on the list
      elseif is_held_back(id) then offset = offset + 1
      elseif is_passed_too(id, queue, passed) then offset = offset + 1
      else
        local verdict, c = decide(id, queue)
        if verdict ~= 'drop' and c.tn then give_place(id, queue, verdict, c)
          if not gone[id] then offset = offset + 1 end
        elseif verdict == 'skip' then offset = offset + 1
        elseif verdict == 'take' and is_passed(queue, c, passed) then
          pass(id, c, passed)
          offset = offset + 1
        else unlist_front(id, queue, verdict, c) end
      end
    end
  end
  take_passed(queue, passed)
end

local is_plain = redis.call('EXISTS', k_claim(nonce), k_rq_suspended()) == 0  -- neither: one look for both
if not is_plain and take_again() then
  write_gathered()
elseif not is_plain and most > 0 and redis.call('EXISTS', k_rq_suspended()) == 1 then
  return {1, {}, {}, '', 0}
else
  -- Whatever goes wrong at a job, those that were taken before it have their leases.
  local ok, problem = pcall(function() for i = QUEUES, #ARGV do claim(ARGV[i]) end end)
  write_gathered()
  if #jobs > 0 or most == 0 then note_claim() end
  if not ok then error(problem, 0) end
end
return {0, jobs, dropped, reserved, math.ceil(again)}
